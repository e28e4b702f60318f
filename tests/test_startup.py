"""What is wrong with a recipe is said before the libraries that its run needs are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "torch._dynamo", "diffusers", "transformers", "accelerate", "peft", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        # What is wrong in the text of a recipe or of --set is said without PyTorch, wrong keys without the models.
        (["run", "demo", "--set", "convert.kv_lora_rank"], []),
        (["recipes", "check", "demo", "--set", "convert.kv_lora_rnak=3"], ["torch"]),
        (["distill", "demo", "--set", "convert.kv_lora_rnak=3"], ["torch"]),
    ],
)
def test_wrong_recipes_import_little(arguments: list[str], heavy: list[str]) -> None:
    code = f"import sys; from mla_convert.cli import main; main({arguments!r}); "
    code += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout.strip(), run.stderr[:7]) == (str(heavy), "error: ")


def test_attention_is_imported_without_the_compiler() -> None:
    """torch.compiler.disable as a decorator would import it, which takes as long as torch itself."""
    code = "import sys, mla_convert.mla.kernels, mla_convert.mla.parallel, mla_convert.mla.model; "
    run = subprocess.run(
        [sys.executable, "-c", code + "print('torch._dynamo' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("package", ["convert", "load"])
def test_names_are_imported_on_first_access(package: str) -> None:
    code = f"import sys, mla_convert.{package} as package; before = 'torch' in sys.modules; "
    code += "print(before, [name for name in package.__all__ if getattr(package, name) is None])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False []"
