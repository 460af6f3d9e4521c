# docker build -t no-representation-no-trust .
# docker run --gpus all --shm-size 1g -v "$PWD/runs:/home/ppo/runs" no-representation-no-trust ppo_pfo_atari.py --pfo-coef 1.0
#
# PyTorch's wheels carry the CUDA libraries: a slim base is enough, the driver comes from the host by way of the NVIDIA
# container runtime. The folder given for runs/ must be writable for user 1000.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics

# git writes the revision into checkpoints; g++ is what --compile needs.
RUN apt-get update && apt-get install -y --no-install-recommends git g++ && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 ppo
WORKDIR /home/ppo
COPY requirements.txt .
RUN pip install -r requirements.txt
COPY --chown=ppo:ppo . .
RUN mkdir -p runs && chown ppo:ppo runs

USER ppo
ENTRYPOINT ["python"]
CMD ["ppo_pfo_atari.py", "--help"]
