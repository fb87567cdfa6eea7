"""What every benchmark result carries, and the compact file that figures are quoted from."""

import platform
from pathlib import Path

import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    machine_info.clear()
    machine_info.update(
        processor=next((x.split(": ")[1] for x in lines if x.startswith("model name")), "unknown"),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=torch.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
    )


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Milliseconds of each provider, case by case: least, median, rounds."""
    output_json["benchmarks"] = [
        {
            "group": b["group"],
            "provider": b["params"]["provider"],
            "min_ms": round(1e3 * b["stats"]["min"], 4),
            "median_ms": round(1e3 * b["stats"]["median"], 4),
            "rounds": b["stats"]["rounds"],
        }
        for b in output_json["benchmarks"]
    ]
    del output_json["commit_info"]
