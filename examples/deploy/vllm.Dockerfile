# lmc on vLLM's own image. Build it from the root of the checkout: docker build -f examples/deploy/vllm.Dockerfile -t lmc-vllm .
FROM vllm/vllm-openai:v0.33.0
COPY pyproject.toml README.md LICENSE /src/
COPY lmc /src/lmc
COPY workloads /src/workloads
COPY dashboards /src/dashboards
RUN pip install --no-cache-dir "/src[s3]" && rm -rf /src
EXPOSE 8000 9400
ENTRYPOINT ["lmc", "serve"]
