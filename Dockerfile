# mkdir -p runs
# docker build --build-arg GIT_REVISION="$(git rev-parse HEAD)" -t no-representation-no-trust .
# docker run --gpus all --user "$(id -u):$(id -g)" -v "$PWD/runs:/home/ppo/runs" no-representation-no-trust ppo_pfo_atari.py
#
# PyTorch's wheels carry the CUDA libraries: a slim base is enough, the driver comes from the host by way of the NVIDIA
# container runtime.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# g++ is what --compile needs, the others what --capture-video does on MuJoCo.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libegl1 libgl1-mesa-dri && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 ppo
WORKDIR /home/ppo
COPY requirements.txt .
RUN pip install -r requirements.txt
COPY --chown=ppo:ppo . .
RUN mkdir -p runs && chown ppo:ppo runs

# Goes into every checkpoint; the image has no repository to ask. HOME is for caches of whoever --user names.
ARG GIT_REVISION=unknown
ENV GIT_REVISION=${GIT_REVISION} HOME=/tmp

USER ppo
ENTRYPOINT ["python"]
CMD ["ppo_pfo_atari.py", "--help"]
