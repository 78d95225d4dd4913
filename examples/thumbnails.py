"""Makes a thumbnail of each picture in a folder, on the least loaded workers.

python examples/thumbnails.py HOST PORT FOLDER OUT
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or: pip install -e .
import overlay
from overlay.model.errors import OverlayError

PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"}


def main(host, port, folder, out):
    files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in PICTURES)
    Path(out).mkdir(parents=True, exist_ok=True)

    def make(file):
        try:
            answer = client.call(file.read_bytes(), mode="any", handler="pictures")
            (Path(out) / f"{file.name}.thumb.jpg").write_bytes(answer.result)
        except (OverlayError, OSError) as e:
            return f"{file.name}: no thumbnail: {e}"
        return f"{file.name}: made by {answer.parts[0].process_id}"

    with overlay.connect(f"{host}:{port}") as client, ThreadPoolExecutor(8) as eight_at_once:
        lines = list(eight_at_once.map(make, files))
    print(*lines, f"{len(files)} pictures; the thumbnails are in {out}", sep="\n")
    return int(any("no thumbnail: " in line for line in lines))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    try:
        sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 5 else __doc__)
    except (OverlayError, ImportError, OSError, ValueError) as e:
        sys.exit(f"thumbnails.py: {e}")
