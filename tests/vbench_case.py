"""A folder like a checkout of VBench, with programs that look for videos and write results as VBench does."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

PROMPTS = [
    ("7 at 2,2 moving up", ["subject_consistency", "dynamic_degree"]),
    ("3 at 1,0 moving right", ["temporal_flickering"]),
    ("3 at 1,0 moving right", ["color"]),
    ("5 at 0,1 moving down-left", ["color"]),
]
# What is alike in VBench's own scripts: options, the file that is written, and `PROMPT-INDEX` plus the suffix
# of whatever file is listed first.
COMMON = """
    import argparse, json, os, sys
    from pathlib import Path

    parser = argparse.ArgumentParser()
    for name in ("output_path", "full_json_dir", "videos_path", "mode", "num_of_samples_per_prompt"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--dimension", nargs="+")
    parser.add_argument("--dev_flag", action="store_true")
    parser.add_argument("--static_filter_flag", action="store_true")
    parser.add_argument("--result_path")
    args = parser.parse_args()
    here = Path(__file__).parent
    if (Path.cwd() / "broken").exists():
        print("loading the model")
        sys.exit("RuntimeError: CUDA error: out of memory")
    names = sorted(os.listdir(args.videos_path))
"""
WRITE = """
    def write(results):
        os.makedirs(args.output_path, exist_ok=True)
        Path(args.output_path, "results_2026-01-01-00:00:00_full_info.json").write_text("[]")
        Path(args.output_path, "results_2026-01-01-00:00:00_eval_results.json").write_text(json.dumps(results))
"""
SHORT = """
    entries = json.loads(Path(args.full_json_dir).read_text())
    results = {}
    for dimension in args.dimension:
        details = []
        for entry in entries:
            for index in range(5):
                name = f"{entry['prompt_en']}-{index}{Path(names[0]).suffix}"
                if dimension in entry["dimension"]:
                    assert name in names, name
                    details.append({"video_path": name, "video_results": 0.5})
        results[dimension] = [0.9 if dimension == "subject_consistency" else 0.5, details]
    write(results)
"""
FILTER = """
    target = Path(args.result_path, "filtered_videos")
    target.mkdir(parents=True)
    moving = [name for name in names if name.startswith("3 at")]
    assert len(moving) == 25, moving
    for index, name in enumerate(moving[-5:]):
        (target / f"{name.rsplit('-', 1)[0]}-{index}.mp4").write_bytes(Path(args.videos_path, name).read_bytes())
"""
LONG = """
    assert args.mode == "long_vbench_standard" and args.dev_flag
    assert args.static_filter_flag == (args.dimension == ["temporal_flickering"])
    for name in names:
        if name.endswith(".mp4"):
            Path(args.videos_path, "split_clip", name.removesuffix(".mp4")).mkdir(parents=True, exist_ok=True)
    clips = os.listdir(Path(args.videos_path, "split_clip"))
    write({dimension: [len(clips) / 100, []] for dimension in args.dimension})
"""
CONSTANTS = """
    NORMALIZE_DIC = {
        "subject consistency": {"Min": 0.1, "Max": 1.0},
        "dynamic degree": {"Min": 0.0, "Max": 1.0},
        "color": {"Min": 0.0, "Max": 1.0},
    }
    DIM_WEIGHT = {"subject consistency": 1, "dynamic degree": 0.5, "color": 1}
    QUALITY_LIST = ["subject consistency", "dynamic degree"]
    SEMANTIC_LIST = ["color"]
    SEMANTIC_WEIGHT = 1
    QUALITY_WEIGHT = 4
"""
FILES = {
    "setup.py": "setup(name='vbench',\n      version='0.1.5',\n)",
    "evaluate.py": COMMON + WRITE + SHORT,
    "static_filter.py": COMMON + FILTER,
    "vbench2_beta_long/eval_long.py": COMMON + WRITE + LONG,
    "scripts/constant.py": CONSTANTS,
    "prompts/all_dimension.txt": "".join(f"    {text}\n" for text, _ in PROMPTS),
}


def write_checkout(folder: Path) -> Path:
    """Write the stand-in for a checkout of VBench into `folder`."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    info = folder / "vbench" / "VBench_full_info.json"
    info.parent.mkdir()
    info.write_text(json.dumps([{"prompt_en": text, "dimension": dimensions} for text, dimensions in PROMPTS]))
    return folder
