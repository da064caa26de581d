# CPU by default. With CUDA: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# vision: bases that take images.
ARG EXTRAS=s3,vision
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/hira
WORKDIR /src
# A compiler for the CPU kernel; it stays behind in this stage.
RUN apt-get update && apt-get install -y --no-install-recommends g++
# Torch alone first: a layer of its own that changes only with its pin.
COPY constraints.txt ./
RUN /opt/hira/bin/pip install "$(grep '^torch==' constraints.txt)" --extra-index-url "$TORCH_INDEX"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY adapters adapters
COPY server server
RUN /opt/hira/bin/pip install -c constraints.txt ".[$EXTRAS]"

FROM python:3.12-slim
# libgomp: the OpenMP run time of torch's CPU build.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home hira \
    && install -d -o hira -g hira /data
COPY --from=build /opt/hira /opt/hira
USER hira
ENV PATH=/opt/hira/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HIRA_HOST=0.0.0.0 \
    HIRA_PORT=8000 \
    HIRA_DATA_DIR=/data \
    HF_HOME=/data/hub
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:%s/health/ready' % os.environ['HIRA_PORT'], timeout=4)"]
ENTRYPOINT ["hira"]
CMD ["serve"]
