# docker build -t pmgaft .
# docker run --rm -p 8080:8080 -p 8082:8082 -e PMGAFT_TOKEN=choose-one pmgaft
# 8080 answers predictions, with the token; 8082 has /metrics and /readyz. Your own bundle:
# ... -v $PWD/bundle:/bundle:ro pmgaft pmgaft serve /bundle --host 0.0.0.0 --metrics-port 8082
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY pmgaft pmgaft
COPY export export
COPY serve serve
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
COPY constraints.txt /constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /constraints.txt /wheels/*.whl
RUN useradd --create-home pmgaft
USER pmgaft
WORKDIR /home/pmgaft
RUN pmgaft export mini-robust --output-dir mini-robust
EXPOSE 8080 8082
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8082/readyz', timeout=4)"]
CMD ["pmgaft", "serve", "mini-robust", "--host", "0.0.0.0", "--metrics-port", "8082"]
