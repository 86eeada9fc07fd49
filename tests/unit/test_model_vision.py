import subprocess
import sys


def test_torchvisions_data_sets_open_whichever_build_is_installed() -> None:
    code = (
        "from model import vision\n"
        "d = vision.datasets()\n"
        "assert d is vision.datasets()\n"
        "import torchvision\n"
        "assert torchvision.datasets is d\n"
        "print(d.Omniglot.folder, d.MNIST.__name__, torchvision.transforms.Resize(28).size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["omniglot-py", "MNIST", "28"], done.stderr


def test_loading_data_needs_no_torchvision() -> None:
    code = "import sys; import model.dataset, model.baseline, model.pairs; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
