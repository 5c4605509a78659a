# The tuned headless server: ComfyUI with this pack, and flags chosen by the card when it starts.
#
#     docker build -t qwen-edit-fast .
#     docker run --gpus all -p 127.0.0.1:8188:8188 -v ./models:/opt/ComfyUI/models qwen-edit-fast
#
# torch brings CUDA's libraries; the host needs an NVIDIA driver and the NVIDIA container toolkit.
FROM python:3.12-slim

# Triton compiles its launchers with a C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1

# In the order in which they change: torch, ComfyUI, this pack.
COPY scripts/environment.txt /tmp/scripts/environment.txt
RUN python -m pip install -r /tmp/scripts/environment.txt
COPY scripts/comfy_host.py /tmp/scripts/comfy_host.py
RUN cd /tmp/scripts \
    && python -c "import sys; from pathlib import Path; from comfy_host import fetch_comfyui; fetch_comfyui(Path(sys.executable), Path('/opt')).rename('/opt/ComfyUI')" \
    && python -m pip install -r /opt/ComfyUI/requirements.txt -r /tmp/scripts/environment.txt
COPY . /opt/ComfyUI/custom_nodes/comfyui-qwen-edit-fast
RUN python -m pip install -r /opt/ComfyUI/custom_nodes/comfyui-qwen-edit-fast/requirements.txt \
    && useradd --create-home comfyui \
    && mkdir -p /opt/ComfyUI/models /opt/ComfyUI/input /opt/ComfyUI/output /opt/ComfyUI/temp /opt/ComfyUI/user \
    && chown -R comfyui /opt/ComfyUI/models /opt/ComfyUI/input /opt/ComfyUI/output /opt/ComfyUI/temp /opt/ComfyUI/user

USER comfyui
WORKDIR /opt/ComfyUI
EXPOSE 8188
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8188/system_stats', timeout=5)"]
ENTRYPOINT ["python", "custom_nodes/comfyui-qwen-edit-fast/scripts/launch_comfyui.py", "--comfyui", "/opt/ComfyUI", "--headless", "--run", "--"]
CMD ["--listen", "0.0.0.0", "--port", "8188"]
