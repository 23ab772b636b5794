"""Tables and figures of bench/loss.py and bench/study_when.py, from their JSON alone."""

from pathlib import Path

COLUMNS = (
    ("median_ms", "ms", "9.1f"),
    ("forward_ms", "forward", "9.1f"),
    ("backward_ms", "backward", "9.1f"),
    ("time_to_naive", "x naive", "8.3f"),
    ("share_of_three_gemms", "x GEMMs", "8.2f"),
    ("tflops_at_6nvd", "TFLOP/s", "8.2f"),
    ("peak_extra_mib", "MiB", "8.0f"),
    ("memory_to_naive", "x naive", "8.3f"),
    ("logprobs_max", "logp", "8.1e"),
    ("entropy_max", "H", "8.1e"),
    ("hidden_grad_rel", "dX", "8.1e"),
    ("weight_grad_rel", "dW", "8.1e"),
)


def print_table(results: dict) -> None:
    """One line per case and provider; "-" where there is nothing to measure."""
    cases = dict.fromkeys(row["case"] for row in results["rows"])
    print(" " * 34, *(f"{title:>{int(form[0])}}" for _, title, form in COLUMNS))
    for case in cases:
        print(f"{case}, error against float64 at the right")
        for row in (r for r in results["rows"] if r["case"] == case):
            cells = (
                "-".rjust(int(form[0])) if row[name] is None else f"{row[name]:{form}}"
                for name, _, form in COLUMNS
            )
            print(f"  {row['provider']:32}", *cells)
    for provider, reason in results["not_run"].items():
        print(f"not run: {provider}: {reason}")


def draw(results: dict, path: Path) -> None:
    """Two panels from the JSON alone: time and peak memory beside naive PyTorch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    providers = list(dict.fromkeys(row["provider"] for row in results["rows"]))
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.6 * len(providers)), sharey=True)
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    for offset, (case, colour) in enumerate(zip(cases, ("#2a6f97", "#e09f3e"), strict=True)):
        rows = {row["provider"]: row for row in results["rows"] if row["case"] == case}
        places = [i + 0.38 * offset for i in range(len(providers))]
        for axis, value, share in (
            (axes[0], "median_ms", "time_to_naive"),
            (axes[1], "peak_extra_mib", "memory_to_naive"),
        ):
            lengths = [rows.get(p, {}).get(value) or 0.0 for p in providers]
            bars = axis.barh(places, lengths, height=0.36, color=colour, label=case)
            found = [rows.get(p, {}).get(share) for p in providers]
            shares = [f" {x:.2f}x" if x else "" for x in found]
            axis.bar_label(bars, shares, fontsize=8)
            axis.margins(x=0.12)
    axes[0].set_yticks([i + 0.19 for i in range(len(providers))], providers)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("forward + backward, median ms")
    axes[1].set_xlabel("peak extra memory, MiB")
    axes[1].legend(frameon=False, loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"policy loss, N={results['tokens']} V={results['vocab']} D={results['hidden']} "
        f"{results['dtype']}, {results['inputs']} inputs, {results['device']} "
        f"({results['threads']} threads), torch {results['torch']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def draw_when(results: dict, path: Path) -> None:
    """What each method gains on on-policy by starting success rate; and where the runs of the
    corner ended, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    corner = results["corner"]
    rows = {(row["rate"], row["arm"]): row for row in results["table"]}
    rates = sorted({rate for rate, _ in rows})
    everywhere = [arm for rate, arm in rows if rate == max(rates)]
    for place, arm in enumerate(everywhere):
        gaps = [rows[rate, arm]["minus_on_policy"] for rate in rates]
        xs = [i + 0.08 * (place - len(everywhere) / 2) for i in range(len(rates))]
        left.plot(xs, [100 * gap["mean"] for gap in gaps], "o", color=f"C{place}", label=arm, ms=4)
        for x, gap in zip(xs, gaps, strict=True):
            if gap["low"] is not None:
                left.plot([x, x], [100 * gap["low"], 100 * gap["high"]], color=f"C{place}", lw=1)
    left.set_xticks(range(len(rates)), [f"{100 * rate:.0f}" for rate in rates])
    left.axhline(0, color="grey", lw=0.6)
    left.set_ylim(-60, 60)
    left.set_xlabel("correct at the start, about, %")
    left.set_ylabel("held-out accuracy minus on-policy, points")
    left.set_title("at equal completions; bars: 95 % over seeds, cut at 60 points", fontsize=9)
    left.legend(frameon=False, fontsize=7, loc="upper right")

    arms = [arm for (rate, arm), row in rows.items() if rate == corner and not row["is_choice"]]
    for place, arm in enumerate(arms):
        ends = [100 * value for value in rows[corner, arm]["end"]["values"]]
        right.plot(ends, [place] * len(ends), "o", color="C0", alpha=0.6, ms=6)
    right.set_yticks(range(len(arms)), arms, fontsize=8)
    right.invert_yaxis()
    right.set_xlim(0, 100)
    right.set_xlabel("held-out accuracy at the end, %")
    right.set_title(f"starting with about {100 * corner:.0f} % correct, a dot a seed", fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"small sums, {results['device']}, {results['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
