"""Where to drop in a recurrent network and in a Transformer?

Small character models learn 5000 characters of real text, the source of Python's own ``argparse``, and are scored on the next
4000 [bits per character, less is better]. That is little text, so both soon learn it by heart. The LSTM's masks are locked, the
same at every time step; those of the Transformer's features and attention weights are fresh everywhere. One should see:

1. Without dropout, validation gets worse before training ends. With dropout at any place the models fit the training text less
   well, and nearly all of them end better.
2. LSTM: locked dropout of the output and dropping the state (the memory) gain most, a tenth of a bit at the best moment. Dropping
   the input gains less, recurrent weights little. Dropping the update (the new information) at the same rate is a loss there: the
   text is learned too slowly.
3. Transformer: dropping features or attention weights gains about the same, with and without renormalisation: what differs is
   no larger than the error bars.

The best moment is chosen on the validation text itself, for all in the same way. ± is one standard error over three seeds
(initialisations, batches and masks), on one text; another Python version has a slightly different one. Rates are equal, not
tuned.
"""

from __future__ import annotations

import argparse
import inspect
import math
from pathlib import Path
from typing import Any, NamedTuple

import gallery
import torch
from gallery import Numbers
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from forcedrop.dropout import AttentionDropout, Dropout, DropoutLSTM, LockedDropout, dropout_attention

P = 0.3
WINDOW, BATCH = 32, 16
FIRST_SEED = 1000  # the settings were chosen on other seeds
N_EVALUATIONS = 6
STYLES = {
    "LSTM": {
        "none": "k",
        "input": "tab:blue",
        "output, locked": "tab:red",
        "state (memory)": "tab:orange",
        "update (new information)": "tab:purple",
        "recurrent weights": "tab:green",
    },
    "Transformer": {
        "none": "k",
        "features": "tab:blue",
        "attention": "tab:red",
        "attention, renormalised": "tab:orange",
    },
}


class Text(NamedTuple):
    """A text as numbers of characters.

    Attributes:
        train: shape (T,).
        validation: shape (T',), what follows.
        n_characters: how many different ones there are in both.
    """

    train: Tensor
    validation: Tensor
    n_characters: int


class Scores(NamedTuple):
    """Bits per character of networks with one kind of dropout.

    Attributes:
        validation: on the way, shape (seeds, evaluations).
        train: at the end, shape (seeds,).
    """

    validation: Tensor
    train: Tensor


class CharacterLSTM(nn.Module):
    """An LSTM over characters, with dropout at one of the places in ``STYLES``."""

    def __init__(self, n_characters: int, place: str, width: int = 64) -> None:
        super().__init__()
        arguments = {"input": "p_input", "state (memory)": "p_state", "update (new information)": "p_update"}
        arguments["recurrent weights"] = "p_weight"
        rates = {arguments[place]: P} if place in arguments else {}
        self.embedding = nn.Embedding(n_characters, 32)
        self.lstm = DropoutLSTM(32, width, batch_first=True, **rates)
        self.locked = LockedDropout(P if place == "output, locked" else 0, batch_first=True)
        self.logits = nn.Linear(width, n_characters)

    def forward(self, characters: Tensor) -> Tensor:
        """Return logits of the next characters, shape (B, T, characters)."""
        return self.logits(self.locked(self.lstm(self.embedding(characters))[0]))


class Block(nn.Module):
    """A Transformer block: causal attention and a perceptron, each after a layer norm."""

    def __init__(self, width: int, heads: int, p_features: float, attention: AttentionDropout) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.features = nn.ModuleList(Dropout(p_features) for _ in range(2))
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape, (B, T, F)."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = dropout_attention(q, k, v, is_causal=True, dropout=self.attention).transpose(1, 2).flatten(2)
        x = x + self.features[0](self.out(attended))
        return x + self.features[1](self.perceptron(self.norms[1](x)))


class CharacterTransformer(nn.Module):
    """A causal Transformer of two blocks over characters, with dropout at one of the places in ``STYLES``."""

    def __init__(self, n_characters: int, place: str, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_characters, width)
        self.position = nn.Parameter(0.1 * torch.randn(WINDOW, width))
        p_features, p_attention = P * (place == "features"), P * place.startswith("attention")
        renormalise = place == "attention, renormalised"
        sites = [AttentionDropout(p_attention, renormalise=renormalise) for _ in range(2)]
        self.blocks = nn.Sequential(*(Block(width, 4, p_features, site) for site in sites))
        self.logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_characters))

    def forward(self, characters: Tensor) -> Tensor:
        """Return logits of the next characters, shape (B, T, characters)."""
        return self.logits(self.blocks(self.embedding(characters) + self.position))


NETWORKS = {"LSTM": CharacterLSTM, "Transformer": CharacterTransformer}
LEARNING_RATES = {"LSTM": 1.5e-2, "Transformer": 3e-3}


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Train every network at every place; the numbers are bits per character and means over seeds."""
    n_seeds, n_steps = (2, 36) if fast else (3, 192)
    text = read(500, 1000) if fast else read(5000, 4000)
    found = {
        network: {place: score(network, place, text, n_seeds, n_steps) for place in places}
        for network, places in STYLES.items()
    }
    for network, of in found.items():
        best = {place: scores.validation.amin(1) for place, scores in of.items()}
        rows = [
            (place, pm(scores.train), pm(scores.validation[:, -1]), pm(best[place]), pm(best[place] - best["none"]))
            for place, scores in of.items()
        ]
        header = ("dropped", "training", "validation, end", "validation, best", "best, over none")
        gallery.table(f"{network}, p = {P}: bits per character, {n_seeds} seeds", header, rows)
    gallery.save(draw(found, n_steps), figure)
    return {
        f"{network}, {place}, {part}": float(values.mean())
        for network, of in found.items()
        for place, scores in of.items()
        for part, values in (("train", scores.train), ("validation", scores.validation[:, -1]))
    }


def read(n_train: int, n_validation: int) -> Text:
    """Return the beginning of argparse's source to train on, and what follows for validation."""
    source = inspect.getsource(argparse)[: n_train + n_validation]
    alphabet = {character: i for i, character in enumerate(sorted(set(source)))}
    numbers = torch.tensor([alphabet[character] for character in source])
    return Text(numbers[:n_train], numbers[n_train:], len(alphabet))


def score(network: str, place: str, text: Text, n_seeds: int, n_steps: int) -> Scores:
    """Train a network for every seed and gather its scores."""
    runs = [train(network, place, text, FIRST_SEED + i, n_steps) for i in range(n_seeds)]
    return Scores(
        torch.tensor([validation for validation, _ in runs]), torch.tensor([training for _, training in runs])
    )


def train(network: str, place: str, text: Text, seed: int, n_steps: int) -> tuple[list[float], float]:
    """Train one network; return bits per character: of validation on the way, and of training at the end."""
    generator = torch.Generator().manual_seed(seed)  # batches: the same at every place
    torch.manual_seed(seed)
    model = NETWORKS[network](text.n_characters, place)
    optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATES[network], fused=True)
    validation = []
    for step in range(1, n_steps + 1):
        start = torch.randint(len(text.train) - WINDOW, (BATCH, 1), generator=generator)
        windows = text.train[start + torch.arange(WINDOW + 1)]
        loss = functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % (n_steps // N_EVALUATIONS) == 0:
            validation.append(bits_per_character(model, text.validation))
    return validation, bits_per_character(model, text.train)


def bits_per_character(model: nn.Module, characters: Tensor) -> float:
    """Return the score without dropout, on the second half of windows that half overlap, so that all have some context."""
    half = WINDOW // 2
    windows = characters.unfold(0, WINDOW + 1, half)
    model.eval()
    with torch.no_grad():
        logits = model(windows[:, :-1])[:, half:]
    model.train()
    return float(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1 + half :].flatten())) / math.log(2)


def pm(values: Tensor) -> str:
    """Return mean ± standard error over seeds as text."""
    return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f}"


def draw(found: dict[str, dict[str, Scores]], n_steps: int) -> Figure:
    """Show validation on the way for both networks, and where each place ends."""
    figure, axes = gallery.panels(3, size=(4.6, 4.2))
    steps = [n_steps * (i + 1) // N_EVALUATIONS for i in range(N_EVALUATIONS)]
    for axis, (network, of) in zip(axes, found.items(), strict=False):
        for shift, (place, scores) in enumerate(of.items()):
            mean, error = scores.validation.mean(0), scores.validation.std(0) / len(scores.train) ** 0.5
            at = [step + 0.008 * n_steps * (shift - 2) for step in steps]
            axis.errorbar(at, mean, error, color=STYLES[network][place], marker="o", ms=3, capsize=2, label=place)
        axis.set(xlabel="step", ylabel="validation [bit per character]", title=f"{network}, p = {P} (± 1 s.e.)")
        axis.legend(fontsize=8)
    draw_places(axes[2], found)
    return figure


def draw_places(axis: Any, found: dict[str, dict[str, Scores]]) -> None:
    """Show the difference to no dropout at each place, at the best moment and at the end."""
    names = []
    for network, of in found.items():
        for place, scores in of.items():
            if place == "none":
                continue
            best = scores.validation.amin(1) - of["none"].validation.amin(1)
            end = (scores.validation - of["none"].validation)[:, -1]
            for values, marker, shift in ((best, "o", 0.12), (end, "s", -0.12)):
                style = {"color": STYLES[network][place], "mfc": "w" if marker == "s" else None, "capsize": 2}
                axis.errorbar(
                    values.mean(), len(names) + shift, xerr=values.std() / len(values) ** 0.5, marker=marker, **style
                )
            names.append(f"{network}\n{place}")
    axis.axvline(0, color="k", lw=0.8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="validation over no dropout [bit per character]", title="● at its best  □ at the end")


if __name__ == "__main__":
    gallery.run(main)
