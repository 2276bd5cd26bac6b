"""Monte-Carlo dropout for a diagnosis: which patients should the network hand on to a physician?

Small networks with dropout learn 100 of the 569 tumours of scikit-learn's breast-cancer data (30 measurements, malignant or
benign) and judge the others, by one plain pass and by 100 function samples. ``classification_summary`` splits the predictive
entropy of the samples into an aleatoric part (the samples are unsure themselves) and an epistemic part (the samples disagree).
One should see:

1. The samples' mean is the better probability: its log loss is about 40 % lower than that of the plain pass.
2. Referring the most uncertain tenth catches seven in ten of the errors; a tenth chosen at random catches one in ten.
3. For that the entropy of the plain softmax does as well: near the data, the ranking of Monte-Carlo dropout, by its predictive
   entropy or by either part, is not better beyond the error bars.
4. Far from the data it matters. Patients who cannot exist, in random directions from the mean, are certain cases to the softmax,
   the more so the further away. The aleatoric part vanishes in the same way, while the epistemic part grows. It stays far from
   ln 2 ("no idea"), though, and half of these patients remain certain cases for the samples too: Monte-Carlo dropout warns, but
   its silence is no proof of having seen everything.

Means ± one standard error over random splits, initialisations and masks; entropies in nats.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import gallery
import torch
from gallery import Numbers
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional

from forcedrop.dropout import Dropout, classification_summary, mc_samples

N_TRAIN, N_SAMPLES, N_FAR = 100, 100, 200
DISTANCES = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # from the mean of the data [standard deviations of a feature]
REFERRED = 0.1  # the share that the table is about
CERTAIN = 0.99
COLOURS = {
    "softmax entropy, plain pass": "tab:blue",
    "predictive entropy": "tab:red",
    "aleatoric": "tab:orange",
    "epistemic": "tab:green",
}
PLAIN, TOTAL, ALEATORIC, EPISTEMIC = COLOURS


class Judgement(NamedTuple):
    """What a network says about patients.

    Attributes:
        plain: probabilities of the plain pass, shape (N, 2).
        sampled: mean of the samples' probabilities, shape (N, 2).
        uncertainty: four measures by the names in ``COLOURS``, shape (N,) each [nat].
    """

    plain: Tensor
    sampled: Tensor
    uncertainty: dict[str, Tensor]


class Trial(NamedTuple):
    """One split: judgements of the test patients, and of invented ones at each of ``DISTANCES``."""

    labels: Tensor
    test: Judgement
    far: list[Judgement]

    def right(self, measure: str) -> Tensor:
        """Return which diagnoses are right: those of the plain pass for its measure, else those of the samples' mean."""
        probabilities = self.test.plain if measure == PLAIN else self.test.sampled
        return probabilities.argmax(-1) == self.labels


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Train on several splits and print scores, referral and the way out of the data."""
    n_trials, n_steps = (3, 150) if fast else (20, 300)
    data = load_breast_cancer()
    patients, labels = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    trials = [run_trial(patients, labels, seed, n_steps) for seed in range(n_trials)]

    loss = {
        "plain pass": torch.tensor([log_loss(t.test.plain, t.labels) for t in trials]),
        f"mean of {N_SAMPLES} samples": torch.tensor([log_loss(t.test.sampled, t.labels) for t in trials]),
    }
    rows = [(name, pm(values)) for name, values in loss.items()]
    gallery.table(f"log loss on test patients [nat], {n_trials} splits", ("prediction", "log loss"), rows)

    caught = {m: torch.tensor([errors_caught(t, m) for t in trials]) for m in COLOURS}
    area = {m: torch.tensor([ranking(t, m) for t in trials]) for m in COLOURS}
    rows = [(m, pm(caught[m]), pm(caught[m] - caught[PLAIN]), pm(area[m])) for m in COLOURS]
    header = (
        "refer by",
        f"errors caught, {REFERRED:.0%} referred",
        "over the softmax",
        "P(error ranks above a right one)",
    )
    gallery.table(f"referral (at random: {REFERRED} and 0.5)", header, rows)

    far = {m: torch.tensor([[float(j.uncertainty[m].mean()) for j in t.far] for t in trials]) for m in COLOURS}
    sure = {
        name: torch.tensor([[certain(getattr(j, name)) for j in t.far] for t in trials])
        for name in ("plain", "sampled")
    }
    rows = [
        (d, *(pm(far[m][:, i]) for m in COLOURS), *(pm(sure[name][:, i], 2) for name in sure))
        for i, d in enumerate(DISTANCES)
    ]
    header = ("distance [σ]", *COLOURS, f"softmax above {CERTAIN}", f"samples' mean above {CERTAIN}")
    gallery.table("far from the data: entropies [nat] and the share of certain cases", header, rows)

    gallery.save(draw(trials, far), figure)
    return {
        "log loss, plain": float(loss["plain pass"].mean()),
        "log loss, sampled": float(loss[f"mean of {N_SAMPLES} samples"].mean()),
        "caught, plain": float(caught[PLAIN].mean()),
        "caught, total": float(caught[TOTAL].mean()),
        "far, plain": float(far[PLAIN][:, -1].mean()),
        "far, total": float(far[TOTAL][:, -1].mean()),
        "far, aleatoric": float(far[ALEATORIC][:, -1].mean()),
        "far, epistemic": float(far[EPISTEMIC][:, -1].mean()),
    }


def run_trial(patients: Tensor, labels: Tensor, seed: int, n_steps: int) -> Trial:
    """Split, standardise by the training part, train, and judge."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(patients), generator=generator)
    train, test = order[:N_TRAIN], order[N_TRAIN:]
    x = (patients - patients[train].mean(0)) / patients[train].std(0)
    torch.manual_seed(seed)
    width = 64
    model = nn.Sequential(
        nn.Linear(x.shape[1], width), nn.ReLU(), Dropout(0.5), nn.Linear(width, width), nn.ReLU(), Dropout(0.5),
        nn.Linear(width, 2),
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    for _ in range(n_steps):
        batch = train[torch.randint(N_TRAIN, (64,), generator=generator)]
        loss = functional.cross_entropy(model(x[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    directions = functional.normalize(torch.randn(N_FAR, x.shape[1], generator=generator))
    return Trial(labels[test], judge(model, x[test], seed), [judge(model, d * directions, seed) for d in DISTANCES])


def judge(model: nn.Module, x: Tensor, seed: int) -> Judgement:
    """Ask the network once and ``N_SAMPLES`` times."""
    with torch.no_grad():
        plain = model.eval()(x).softmax(-1)
        summary = classification_summary(mc_samples(model, x, N_SAMPLES, seed))
    measures = (
        torch.special.entr(plain).sum(-1),
        summary.predictive_entropy,
        summary.expected_entropy,
        summary.mutual_information,
    )
    return Judgement(plain, summary.probabilities, dict(zip(COLOURS, measures, strict=True)))


def log_loss(probabilities: Tensor, labels: Tensor) -> float:
    """Return −ln of the probability of what is true, mean over patients."""
    return float(functional.nll_loss(probabilities.clamp_min(1e-12).log(), labels))


def accuracy_curve(trial: Trial, measure: str) -> Tensor:
    """Return the accuracy on the k most certain patients, k = N … 1, shape (N,): entry r has r patients referred."""
    right = trial.right(measure)[trial.test.uncertainty[measure].argsort(stable=True)].double()
    return (right.cumsum(0) / torch.arange(1, len(right) + 1)).flip(0)


def errors_caught(trial: Trial, measure: str) -> float:
    """Return which share of the errors is among the most uncertain ``REFERRED`` of the patients."""
    wrong = ~trial.right(measure)[trial.test.uncertainty[measure].argsort(stable=True, descending=True)]
    return float(wrong[: round(REFERRED * len(wrong))].sum() / wrong.sum())


def ranking(trial: Trial, measure: str) -> float:
    """Return the probability that an error is ranked as more uncertain than a right diagnosis (area under the ROC curve)."""
    right, u = trial.right(measure), trial.test.uncertainty[measure]
    difference = u[~right][:, None] - u[right]
    return float(((difference.sign() + 1) / 2).mean())


def certain(probabilities: Tensor) -> float:
    """Return the share of patients whose more probable diagnosis has more than ``CERTAIN``."""
    return float((probabilities.amax(-1) > CERTAIN).double().mean())


def pm(values: Tensor, digits: int = 3) -> str:
    """Return mean ± standard error over the trials as text."""
    return f"{values.double().mean():.{digits}f} ± {values.double().std() / len(values) ** 0.5:.{digits}f}"


def draw(trials: list[Trial], far: dict[str, Tensor]) -> Figure:
    """Show both parts of the uncertainty of one split, accuracy against referral, and the way out of the data."""
    figure, (parts, referral, outside) = gallery.panels(3, size=(4.4, 4.0))
    draw_parts(parts, trials[0])
    draw_referral(referral, trials)
    for measure, colour in reversed(COLOURS.items()):
        mean, error = far[measure].mean(0), far[measure].std(0) / len(trials) ** 0.5
        line = "--" if measure == PLAIN else "-"  # it all but coincides with the aleatoric part
        outside.errorbar(DISTANCES, mean, error, color=colour, ls=line, marker="o", ms=4, capsize=2, label=measure)
    outside.axhline(math.log(2), color="k", ls=":", label="ln 2: no idea")
    outside.set(xscale="log", xlabel="distance from the mean of the data [σ of a feature]", ylabel="mean entropy [nat]")
    outside.set(title="Invented patients, random directions", ylim=(-0.02, 1.12))
    outside.legend(fontsize=8, loc="upper right", ncols=2)
    return figure


def draw_parts(axis: Any, trial: Trial) -> None:
    """Show the aleatoric and the epistemic part for test patients of one split, and for invented ones."""
    right, u = trial.right(TOTAL), trial.test.uncertainty
    at = DISTANCES.index(100)
    invented = trial.far[at].uncertainty
    clouds = (
        (
            invented[ALEATORIC],
            invented[EPISTEMIC],
            {"c": "0.7", "marker": "x", "label": f"invented, {DISTANCES[at]} σ away"},
        ),
        (u[ALEATORIC][right], u[EPISTEMIC][right], {"c": "tab:blue", "marker": "o", "label": "test patient, right"}),
        (u[ALEATORIC][~right], u[EPISTEMIC][~right], {"c": "tab:red", "marker": "D", "label": "test patient, wrong"}),
    )
    for x, y, style in clouds:
        axis.scatter(x, y, s=14, **style)
    axis.set(xlabel="aleatoric part [nat]", ylabel="epistemic part [nat]", title="Two kinds of doubt, one split")
    axis.legend(fontsize=8)


def draw_referral(axis: Any, trials: list[Trial]) -> None:
    """Show the accuracy on the patients that are left against the share referred."""
    n = len(trials[0].labels)
    shown = range(0, n // 2, 4)
    share = [100 * r / n for r in shown]
    curves = {
        m: 100 * torch.stack([accuracy_curve(t, m) for t in trials])[:, list(shown)] for m in (PLAIN, TOTAL, EPISTEMIC)
    }
    for measure, curve in curves.items():
        mean, error = curve.mean(0), curve.std(0) / len(trials) ** 0.5
        axis.plot(share, mean, color=COLOURS[measure], label=f"by {measure}")
        axis.fill_between(share, mean - error, mean + error, color=COLOURS[measure], alpha=0.2, lw=0)
    # whoever is referred at random leaves the accuracy as it is, on average
    axis.axhline(float(curves[TOTAL][:, 0].mean()), color="k", ls="--", label="at random")
    axis.set(xlabel="patients referred [%]", ylabel="accuracy on the others [%]")
    axis.set_title("Who is referred to a physician? (± 1 s.e.)")
    axis.legend(fontsize=8, loc="center right")


if __name__ == "__main__":
    gallery.run(main)
