# lmc on SGLang's own image. Build it from the root of the checkout: docker build -f examples/deploy/sglang.Dockerfile -t lmc-sglang .
FROM lmsysorg/sglang:v0.5.23
COPY pyproject.toml README.md LICENSE /src/
COPY lmc /src/lmc
COPY workloads /src/workloads
COPY dashboards /src/dashboards
RUN pip install --no-cache-dir "/src[s3]" && rm -rf /src
EXPOSE 8000 9400
ENTRYPOINT ["lmc", "serve"]
