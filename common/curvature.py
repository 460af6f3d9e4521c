"""How a network learns where it stands: its tangent kernel, the agreement of its gradients, and the loss's curvature.

The network and its loss are functions of their parameters: a dict by name of floating-point tensors of one dtype, P
numbers in all, on any device. Every function here is pure, changes no weight, draws its random numbers from a generator
on the CPU and returns 0-dim float64 tensors on the CPU. What can't be measured is NaN: no number raises.

Derivatives are taken by `torch.func`, in parts: the tangent kernel takes up to twice BUDGET of memory and a little
more, and half of that where all states fit one block; everything else takes a few times the parameters' memory.
"""

import math

import torch
from torch.func import grad, vjp, vmap

BUDGET = 2**29  # bytes of a block of Jacobians: 64 states of Nature's network, 1.7 M parameters, are 432 MB
AT_ONCE = 2**25  # bytes of those that one call of vmap makes
MANY = 2**22  # bytes of the vectors that meet the Hessian at once; for networks beyond it, one by one is faster


def ntk(function, parameters, obs):
    """Empirical neural tangent kernel, summed over outputs: Θ_ij = Σ_k ∇f_k(x_i)·∇f_k(x_j).

    C-CHAIN (Tang et al. 2025, arXiv 2506.00592) has ∇f(x_i)·∇f(x_j) after Lyle et al. 2024, for an f that it says no
    more of. Of a vector of outputs this is the trace over outputs of the full kernel: none is preferred, and rotating
    them changes nothing; the gradient of their sum would be blind to differences between actions.

    Args:
        function(parameters, obs): the outputs (N, K), of which each depends on its own sample alone.
        obs: (N, …).

    Costs N·K gradients, and N²·K·P multiplications; blocks of states beyond BUDGET are computed repeatedly. Returns
    (N, N) float64 on the CPU.
    """
    with torch.no_grad():
        num_outputs = function(parameters, obs[:1]).shape[1]
    blocks = torch.arange(len(obs)).split(max(1, BUDGET // _bytes(parameters)))
    kernel = torch.zeros((len(obs), len(obs)), dtype=torch.float64)
    for k in range(num_outputs):
        for i, rows in enumerate(blocks):
            of_rows = of_columns = None  # before the next ones, or both would take memory at once
            of_rows = _jacobian(function, parameters, obs[rows.to(obs.device)], k)
            kernel[rows[0] : rows[-1] + 1, rows] += (of_rows @ of_rows.T).cpu().double()
            for columns in blocks[:i]:
                of_columns = None
                of_columns = _jacobian(function, parameters, obs[columns.to(obs.device)], k)
                product = (of_rows @ of_columns.T).cpu().double()
                kernel[rows[0] : rows[-1] + 1, columns] += product
                kernel[columns[0] : columns[-1] + 1, rows] += product.T
    return kernel


def _jacobian(function, parameters, obs, k):
    """Gradients (N, P) of output ``k``."""
    like = next(iter(parameters.values()))
    jacobian = like.new_empty((len(obs), _size(parameters)))  # filled piece by piece: to join them takes twice as much
    of_sample = vmap(grad(lambda parameters, x: function(parameters, x.unsqueeze(0))[0, k]), (None, 0))
    size = max(1, AT_ONCE // _bytes(parameters))
    for rows, part in zip(jacobian.split(size), obs.split(size), strict=True):
        torch.cat([x.flatten(1) for x in of_sample(parameters, part).values()], dim=1, out=rows)
    return jacobian


def ntk_effective_rank(kernel, eps=2**-23):
    """exp of the entropy of λ/Σλ, λ the eigenvalues of the kernel J Jᵀ: how many directions in function space it moves.

    C-CHAIN shows that this matrix loses rank with plasticity. It is the effective rank of Roy & Vetterli 2007 of Θ, not
    of J, whose singular values are the roots.

    Args:
        kernel: (N, N), symmetric, positive semi-definite but for rounding.
        eps: relative rounding error of its entries, float32's; eigenvalues up to N · eps · λ₁ count as 0.

    Returns a number from 1 to N that no scale changes; 0 for a kernel of zeros, NaN if it is empty or not finite.
    """
    kernel = kernel.detach().double().cpu()
    scale = kernel.abs().amax() if kernel.numel() else torch.tensor(math.nan)
    if not scale.isfinite():
        return _nan()
    if scale == 0:
        return torch.zeros((), dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(kernel / scale)
    eigenvalues = eigenvalues.where(eigenvalues > len(kernel) * eps * eigenvalues[-1], 0.0)
    return torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp()


def gradient_cosine(loss, parameters, obs, target):
    """Mean cosine between the gradients of the loss on two different samples (the gradient covariance of Lyle et al.
    2023, arXiv 2303.01486, of which this is the mean off the diagonal).

    Near 1 every sample pulls the weights the same way, near 0 each has its own; below 0 they undo each other.

    Args:
        loss(parameters, obs, target): the loss (N,) of each sample, which depends on that sample alone.
        obs: (N, …). target: (N, …).

    Costs N gradients. Returns a number from −1/(N − 1) to 1. A gradient of 0 has no direction, and its pairs are left
    out: NaN where fewer than two samples have one, or a gradient is not finite.
    """
    of_sample = vmap(grad(lambda p, x, y: loss(p, x.unsqueeze(0), y.unsqueeze(0))[0]), (None, 0, 0))
    size = max(1, AT_ONCE // _bytes(parameters))
    total, count, finite = 0.0, 0, True
    for x, y in zip(obs.split(size), target.split(size), strict=True):
        gradients = torch.cat([g.flatten(1) for g in of_sample(parameters, x, y).values()], dim=1)
        largest = gradients.abs().amax(dim=1, keepdim=True)
        finite = finite and bool(largest.isfinite().all())
        gradients = gradients[largest.squeeze(1) > 0] / largest[largest > 0].unsqueeze(1)  # their squares are normal
        total = total + (gradients / gradients.norm(dim=1, keepdim=True)).sum(dim=0)
        count += len(gradients)
    if not finite or count < 2:
        return _nan()
    # ‖Σ u‖² of unit vectors is their number and twice the sum of the cosines of all pairs.
    return (total.cpu().double().square().sum() - count) / (count * (count - 1))


def hessian_product(loss, parameters):
    """What multiplies vectors with the Hessian of ``loss(parameters)``, a 0-dim tensor, at these parameters.

    Returns a function from (D, P) to (D, P), on the parameters' device and in their dtype; its columns are those of the
    parameters in their order, each flattened. A product costs about two gradients.
    """
    _, times = vjp(grad(loss), parameters)  # the Hessian is symmetric: from either side it is the same
    shapes = {name: x.shape for name, x in parameters.items()}
    sizes = [x.numel() for x in parameters.values()]

    def of_one(vector):
        pieces = vector.split(sizes)
        pieces = {name: x.view(shape) for (name, shape), x in zip(shapes.items(), pieces, strict=True)}
        return torch.cat([x.flatten() for x in times(pieces)[0].values()])

    def product(vectors):
        size = max(1, MANY // (vectors.element_size() * vectors.shape[1]))
        if size == 1:
            return torch.stack([of_one(vector) for vector in vectors])
        return torch.cat([vmap(of_one)(part) for part in vectors.split(size)])

    return product


def hessian_max(product, parameters, generator, steps=20):
    """Eigenvalue of the largest modulus of a Hessian, with its sign, by power iteration.

    The sharpness that arXiv 2506.15544 (Castanyer et al. 2025) and others follow, of a probe's loss.

    Args:
        product: as ``hessian_product`` makes it, of these ``parameters``.
        generator: draws the first vector, standard normal.
        steps: products with the Hessian.

    Returns the Rayleigh quotient of the vector that ``steps`` − 1 products make, which no modulus of an eigenvalue is
    below; it is between the two where the largest ones have opposite signs and nearly one modulus. 0 for a Hessian of
    zeros, NaN for one that is not finite.
    """
    like, value = next(iter(parameters.values())), 0.0
    vector = torch.randn(_size(parameters), generator=generator).to(like)
    vector /= vector.norm()
    for _ in range(steps):
        image = product(vector.unsqueeze(0)).squeeze(0)
        value, norm = _dot(vector, image), image.norm()
        if not norm.isfinite():
            return _nan()
        if norm == 0:
            break
        vector = image / norm
    return value


def hessian_trace(product, parameters, generator, draws=50):
    """Hutchinson's estimate of a Hessian's trace: the mean of vᵀHv over vectors v of random signs (Hutchinson 1990).

    arXiv 2506.15544 (Castanyer et al. 2025) sees the trace of RL's losses vanish where networks stop learning.

    Args:
        product: as ``hessian_product`` makes it, of these ``parameters``.
        generator: draws the signs (Rademacher).
        draws: how many vectors.

    Exact for a diagonal Hessian; else its variance is 2 Σ_{i≠j} H_ij² / ``draws``. NaN for a Hessian that isn't finite.
    """
    like, total = next(iter(parameters.values())), 0.0
    size = max(1, min(draws, MANY // _bytes(parameters)))
    for first in range(0, draws, size):
        shape = (min(size, draws - first), _size(parameters))
        signs = torch.randint(2, shape, generator=generator, dtype=torch.int8).to(like) * 2 - 1
        total = total + _dot(signs, product(signs))
    mean = total / draws
    return mean.where(mean.isfinite(), math.nan)


def _size(parameters):
    return sum(x.numel() for x in parameters.values())


def _bytes(parameters):
    return sum(x.numel() * x.element_size() for x in parameters.values())


def _dot(x, y):
    return (x.cpu().double() * y.cpu().double()).sum()  # to the CPU first: MPS has no float64


def _nan():
    return torch.tensor(math.nan, dtype=torch.float64)
