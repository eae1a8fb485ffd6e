# Everything but weights and data; docs/containers.md says how to run it.
FROM python:3.11-slim-bookworm

# gcc: Triton compiles what starts its kernels. The other two are for OpenCV (`prepare`).
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/cogvideox-finetune
# The libraries, torch with CUDA among them, are a layer of their own that a change of the code leaves as it is.
ARG EXTRAS=prepare
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY finetune/__init__.py finetune/
RUN pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"
COPY finetune finetune
COPY accelerate_configs accelerate_configs
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# What is written and downloaded (~/.cache/huggingface) lands on the volume, whoever runs it.
ENV HOME=/workspace
WORKDIR /workspace
CMD ["finetune", "--help"]
