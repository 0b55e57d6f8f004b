"""A ticket in a recognizer of spoken words, a network of 1-d convolutions; espeak-ng speaks the words.

    apt-get install espeak-ng
    python docs/examples/speech.py                     # searches with the settings at the end of this file
    python docs/examples/speech.py --rounds 2          # with others

Eight commands, by voices of several accents and characters, fast and slow, high and low. Validation and test voices
are other ones than those in training. The words are spoken once and kept in a folder, `spoken` unless you say
otherwise: --data-arg folder=...
"""

import math
import random
import shutil
import subprocess
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

WORDS = ["yes", "no", "up", "down", "left", "right", "stop", "go"]
RATE = 22050  # samples a second, as espeak-ng gives them
ACCENTS = ["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd"]
VOICES = {  # characters of espeak-ng's, which make another speaker of each accent
    "train": ["m1", "m2", "m3", "m4", "m7", "f1", "f2", "f5", "croak"],
    "validation": ["m5", "f3"],
    "test": ["m6", "m8", "f4"],
}

# ------------------------------------------------------------------------------------------------ the data


def speak(folder, part, count):
    """`count` recordings of each word by the voices of a part: files and labels."""
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng is missing (Debian: apt-get install espeak-ng)")
    folder.mkdir(parents=True, exist_ok=True)
    draw, jobs, labels = random.Random(part), [], []
    for label, word in enumerate(WORDS):
        for number in range(count):
            voice = f"{draw.choice(ACCENTS)}+{draw.choice(VOICES[part])}"
            speed, pitch = draw.randint(110, 230), draw.randint(20, 80)
            file = folder / f"{part}-{word}-{number}.wav"
            jobs.append((file, ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", file, word]))
            labels.append(label)
    missing = [command for file, command in jobs if not file.exists()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), missing))
    return [file for file, _ in jobs], torch.tensor(labels)


def samples(file):
    """A second of sound [RATE] in -1..1, the word from its first loud sample on."""
    with wave.open(str(file)) as sound:
        assert sound.getframerate() == RATE and sound.getnchannels() == 1 and sound.getsampwidth() == 2
        found = torch.frombuffer(bytearray(sound.readframes(RATE * 3)), dtype=torch.int16) / 2**15
    begin = int((found.abs() > 0.02).nonzero()[0])
    return F.pad(found[begin : begin + RATE], (0, max(0, RATE - len(found) + begin)))


def log_mel(sound, bands=40, window=512, hop=220):
    """[n, samples] -> [n, bands, frames]: the loudness of each band of the mel scale, every 10 ms."""
    spectrum = torch.stft(sound, window, hop, window=torch.hann_window(window), return_complex=True).abs() ** 2
    mel = torch.linspace(mel_of(60), mel_of(RATE / 2), bands + 2)
    corners = 700 * (10 ** (mel / 2595) - 1)
    frequency = torch.linspace(0, RATE / 2, window // 2 + 1)[:, None]
    rise = (frequency - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - frequency) / (corners[2:] - corners[1:-1])
    triangles = torch.minimum(rise, fall).clamp(min=0)  # [frequencies, bands]
    return (spectrum.mT @ triangles).clamp(min=1e-5).log().mT


def mel_of(frequency):
    return 2595 * math.log10(1 + frequency / 700)


def recordings(part, folder, count):
    """Features and labels; the sound is moved by up to 0.1 s and is a little noisy."""
    files, labels = speak(folder, part, count)
    generator = torch.Generator().manual_seed(len(part))
    sounds = torch.stack([samples(file) for file in files])
    for sound in sounds:
        sound.copy_(sound.roll(int(torch.randint(RATE // 10, (), generator=generator))))
    sounds += 0.03 * torch.randn(sounds.shape, generator=generator)
    features = log_mel(sounds)
    return (features - features.mean((1, 2), keepdim=True)) / 3, labels


def commands(folder="spoken", count=150):
    """(train, validation, test), for --data; `count` recordings of each word to train on, a quarter for the others."""
    quarter = max(1, count // 4)
    sizes = {"train": count, "validation": quarter, "test": quarter}
    return tuple(recordings(part, Path(folder), sizes[part]) for part in sizes)


# ----------------------------------------------------------------------------------------------- the model


class Recognizer(nn.Module):
    """[b, bands, frames] -> [b, words]: convolutions along time, the mean over what is left of it."""

    def __init__(self, num_classes=8, bands=40, width=48):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(bands if i == 0 else width, width, 5, stride=2, padding=2, bias=False) for i in range(3)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in self.convs)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean(-1))


SETTINGS = [
    "--model", f"{__file__}:Recognizer", "--data", f"{__file__}:commands", "--out", "runs/speech",
    "--iterations", "300", "--batch-size", "40", "--lr", "3e-3", "--prune", "0.3", "--rounds", "8", "--rewind", "15it",
    "--replicates", "3",
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(subprocess.call([sys.executable, "-m", "ticketfind", "search", *SETTINGS, *sys.argv[1:]]))
