"""TorchServe with its own settings around the plain handler of torchserve_handler.py.

python torchserve_plain.py MODEL --port PORT --threads N
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    chosen = parser.parse_args()
    import ts
    import yaml

    from pmgaft_serve.torchserve import find_java, free_ports, java_flags

    state = Path(tempfile.mkdtemp(prefix="plain-"))
    model = state / "store" / "plain"
    (model / "MAR-INF").mkdir(parents=True)
    shutil.copy(HERE / "torchserve_handler.py", model)
    settings = {"peers": str(HERE), "model": chosen.model, "threads": chosen.threads}
    config = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "responseTimeout": 600, "handler": settings}
    (model / "config.yaml").write_text(yaml.safe_dump(config))
    about = {
        "modelName": "plain",
        "modelVersion": "1.0",
        "handler": "torchserve_handler.py",
        "configFile": "config.yaml",
    }
    manifest = {"createdOn": "", "runtime": "python", "archiverVersion": "0.12.0", "model": about}
    (model / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    ports = free_ports(5)
    properties = {
        "inference_address": f"http://127.0.0.1:{chosen.port}",
        "management_address": f"http://127.0.0.1:{ports[0]}",
        "metrics_address": f"http://127.0.0.1:{ports[1]}",
        "grpc_inference_port": ports[2],
        "grpc_management_port": ports[3],
        "initial_worker_port": ports[4],
        "model_store": state / "store",
        "load_models": "plain",
        "disable_token_authorization": "true",
    }
    (state / "config.properties").write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    java = find_java()
    torchserve = Path(ts.__file__).parent
    os.environ.update({"TEMP": str(state), "TMPDIR": str(state), "LOG_LOCATION": str(state / "logs")})
    os.environ["METRICS_LOCATION"] = str(state / "logs")
    os.chdir(state)
    command = [
        *(str(java.path), *java_flags(java.version), f"-Dmodel_server_home={torchserve.parent}"),
        *(f"-Djava.io.tmpdir={state}", "-cp", str(torchserve / "frontend" / "*"), "org.pytorch.serve.ModelServer"),
        *("--python", sys.executable, "-f", "config.properties", "-s", "store", "-ncs"),
    ]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
