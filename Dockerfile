# docker build -t nemo_mtbi . && docker run --rm -it -v "$PWD/runs:/work/runs" nemo_mtbi mtbi quickstart output_dir=/work/runs/quickstart
# For GPUs: --build-arg TORCH_ARGS="--index-url https://download.pytorch.org/whl/cu128", and docker run --gpus all
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make git g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY . .
ARG TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
RUN PIP_NO_CACHE_DIR=1 make install TORCH_ARGS="$TORCH_ARGS"
ENV PATH=/work/.venv/bin:$PATH NEMO_MTBI_CACHE=/work/runs/cache
CMD ["mtbi", "--help"]
