"""A ticket in a small transformer that answers questions about reviews: dict batches, padding, tied embedding.

    python docs/examples/text.py                       # searches with the settings at the end of this file
    python docs/examples/text.py --rounds 2            # with others

A review says something of one or two things, and is then asked about one of them, by a word that is masked:
"the food was not good and the music was nice . the food was [MASK]". The answer is good, bad or unknown.
The network is a masked language model: its output layer is its embedding, and of its scores for every word those
of the three answers are taken.
"""

import random
import subprocess
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

ASPECTS = ["food", "service", "room", "music", "price", "view"]
GOOD = ["good", "nice", "great", "lovely"]
BAD = ["bad", "poor", "awful", "dull"]
ANSWERS = ["good", "bad", "unknown"]
OTHERS = [".", "and", "but", "not", "that", "the", "think", "very", "was", "we"]
WORDS = ["[PAD]", "[MASK]", "unknown", *ASPECTS, *GOOD, *BAD, *OTHERS]
IDS = {word: i for i, word in enumerate(WORDS)}

# ------------------------------------------------------------------------------------------------ the data


def review(draw):
    """A text, by a grammar, and the number of its answer."""
    told, answers = [], {}
    for aspect in draw.sample(ASPECTS, draw.randint(1, 2)):
        good, negated = draw.random() < 0.5, draw.random() < 0.4
        answers[aspect] = int(good == negated)
        degree = draw.choice([["not"], ["not", "very"]] if negated else [[], ["very"]])
        opening = draw.choice([[], ["we", "think", "that"]])
        told.append([*opening, "the", aspect, "was", *degree, draw.choice(GOOD if good else BAD)])
    words = told[0]
    for clause in told[1:]:
        words = [*words, draw.choice(["and", "but"]), *clause]
    others = [aspect for aspect in ASPECTS if aspect not in answers]
    asked = draw.choice(others if draw.random() < 0.25 else list(answers))
    return [*words, ".", "the", asked, "was", "[MASK]"], answers.get(asked, 2)


def tokenized(count, seed):
    """Texts as a dict of tensors, padded on the left to the longest: what a tokenizer of a library gives."""
    draw = random.Random(seed)
    texts, labels = zip(*(review(draw) for _ in range(count)), strict=True)
    longest = max(map(len, texts))
    return {
        "input_ids": torch.tensor([[IDS["[PAD]"]] * (longest - len(text)) + [IDS[w] for w in text] for text in texts]),
        "attention_mask": torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts]),
        "labels": torch.tensor(labels),
    }


def reviews(train=12000, test=1000):
    """(train, test), for --data."""
    return tokenized(train, seed=0), tokenized(test, seed=1)


# ----------------------------------------------------------------------------------------------- the model


@dataclass
class Output:
    """What transformers of a well-known library return: .logits [b, 3] and, where labels are given, .loss."""

    logits: torch.Tensor
    loss: torch.Tensor | None


class Classifier(nn.Module):
    """The answer to a review's question. The embedding, tied to the output layer, is not pruned: it stays whole."""

    def __init__(self, width=32, heads=4, depth=2, longest=64):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), width)
        self.position = nn.Embedding(longest, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = nn.Linear(width, len(WORDS), bias=False)
        self.decoder.weight = self.embedding.weight
        for parameters in (self.embedding, self.position):
            nn.init.normal_(parameters.weight, std=0.1)
        for layer in self.encoder.layers:  # nn.TransformerEncoder starts all its layers alike
            for weight in layer.parameters():
                if weight.ndim == 2:
                    nn.init.xavier_uniform_(weight)

    def forward(self, input_ids, attention_mask, labels=None):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.embedding(input_ids) + self.position(places)
        hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        asked = hidden[input_ids == IDS["[MASK]"]]  # one a text: [b, width]
        logits = self.decoder(asked)[:, [IDS[word] for word in ANSWERS]]
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))


SETTINGS = [
    "--model", f"{__file__}:Classifier", "--data", f"{__file__}:reviews", "--out", "runs/text",
    "--iterations", "1000", "--batch-size", "64", "--lr", "2e-3", "--prune", "0.5", "--rounds", "4", "--rewind", "50it",
    "--replicates", "3",
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(subprocess.call([sys.executable, "-m", "ticketfind", "search", *SETTINGS, *sys.argv[1:]]))
