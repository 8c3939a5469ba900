"""PNG, and a summary of at most 40 lines, from whatever run.json holds."""

import json
from pathlib import Path

from stage import MORE, STAGES, Stage, plan


def _entries(groups: list[dict]) -> list:
    from results import Entry

    return [Entry(e["group"], e["info"], tuple(e["wall"])) for g in groups for e in g["entries"]]


def _groups(data: dict) -> list[dict]:
    return [g for name in ("core", "models") for g in data.get(name, {}).get("groups", [])]


def plots(stage: Stage) -> None:
    import plots as drawing
    from results import Run

    data = stage.load()
    entries = _entries(_groups(data))
    entries.sort(key=lambda e: e.problem["dtype"] == "bfloat16")  # the plots show the last type
    record = next((data[name]["record"] for name in ("core", "models") if "record" in data.get(name, {})), None)
    if record is None:
        raise RuntimeError("there is nothing to plot: neither benchmark left a result")
    run = Run.of(entries, record | {"rooflines": {k: v for k, v in data.get("roofline", {}).items() if isinstance(v, dict)}})
    with drawing.plt.rc_context(drawing.STYLE):
        for name in ("speed", "roofline"):
            figure = getattr(drawing, name)(run)
            figure.savefig(stage.out / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
            drawing.plt.close(figure)


def _short(group: dict, rooflines: dict) -> str:
    """One line of the summary: ours, its distance from the roofline, everyone else's time over ours."""
    from results import leader, least_seconds

    entries = _entries([group])
    mine = leader(entries)
    if mine is None:
        return f"{group['name']}: ours is missing: " + "; ".join(group["absent"].values())[:80]
    others = []
    for e in entries:
        if e is not mine:
            short = {
                "timm eager": "timm",
                "timm convit eager": "timm",
                "SDPA + dense P@v": "dense",
                "plain SDPA": "SDPA",
                "convit sdpa": "factored",
            }
            short |= {
                "torch.compile(timm)": "compiled timm",
                "torch.compile(convit)": "compiled",
                "torch.compile(ViT)": "compiled ViT",
                "convit without GPSA": "no GPSA",
                "FlexAttention x 2": "flex",
                "timm ViT with SDPA": "ViT",
                "convit.accelerate(timm)": "accel",
            }
            others.append(f"{short.get(e.peer, e.peer)} {e.over(mine):.2f}")
    least = least_seconds(mine, rooflines) if "flops" in mine.info else None
    floor = f" roof {100 * least / mine.median:.0f}%" if least else ""
    if "peak" in mine.info:
        floor += f" peak {mine.info['peak'] / 1e6:.0f} MB"
    host = (
        f" (host {mine.info['host'] * 1e6:.0f}{'' if mine.info.get('timed') == 'graph' else ', not a graph'})"
        if "host" in mine.info
        else ""
    )
    return f"{group['name'].replace(' cuda', '')}: {mine.median * 1e6:.0f} us{host}{floor} | " + ", ".join(others)


def summary(out: Path) -> int:
    """Print and write at most 40 lines, from whatever run.json holds; 1 if a stage failed."""
    data = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    found, ended = data.get("environment", {}), data.get("stages", {})
    versions = found.get("versions", {})
    lines = [
        f"{found.get('device', 'device unknown')}, torch {versions.get('torch')}, triton {versions.get('triton')}, "
        f"commit {str(found.get('commit'))[:10]}"
    ]
    words = [
        f"{name} {({0: 'ok', MORE: 'has more to do'}).get(end['status'], 'FAILED(' + str(end['status']) + ')')} {end['seconds']}s"
        for name in STAGES
        for end in [ended.get(name)]
        if end
    ]
    lines += ["stages: " + ", ".join(words)]
    for name, end in ended.items():
        if end["status"] not in (0, MORE):
            lines.append(f"  {name}: " + str(data.get(name, {}).get("error", "killed or out of time")).splitlines()[0][:150])
    judged = data.get("correctness", {})
    if "checks" in judged:
        lines.append(f"correct: {judged['passed']} of {judged['checks']}")
        lines += [f"  {name}: {why.splitlines()[0]}"[:160] for name, why in list(judged["wrong"].items())[:4]]
    tools = data.get("sanitizer", {}).get("tools", {})
    if tools:
        lines.append("compute-sanitizer: " + ", ".join(f"{tool} {report['status']}" for tool, report in tools.items()))
    for key, peaks in data.get("roofline", {}).items():
        if isinstance(peaks, dict):
            lines.append(f"peak {key.rsplit(' ', 1)[0]}: {peaks['flops'] / 1e12:.4g} TFLOP/s, {peaks['bytes'] / 1e9:.4g} GB/s")
    rows = [
        f"{name} {tuple(k['row'][3])} {k['tried'][0]['gain']:.2f}x"
        for name, k in data.get("sweep", {}).get("kernels", {}).items()
        if "row" in k
    ]
    if "kernels" in data.get("sweep", {}):
        lines.append(("sweep (configs.txt), used below: " + "; ".join(rows) if rows else "sweep: the table's rows stand")[:400])
    for dtype, mine in data.get("sweep", {}).get("content", {}).items():
        times = [
            f"{case} " + ", ".join(f"{name} {k['loop'][name] * 1e6:.0f} / {k['sdpa'][name] * 1e6:.0f}" for name in k["loop"])
            for case, k in mine["cases"].items()
        ]
        verdict = mine.get("refused", "SDPA is used below" if "row" in mine else "the loops stand")
        lines.append(f"content {dtype}, us by the loops / by SDPA: {'; '.join(times)}: {verdict}"[:250])
    groups = _groups(data)
    if groups:
        lines.append("ours on the device (its host) | the others' time over ours, medians of interleaved rounds of replayed graphs:")
    room = 40 - len(lines) - 2
    models_ = [g for g in groups if g["name"].startswith("convit_")]
    kept = [g for g in groups if g not in models_][: max(room - len(models_), room // 2)] + models_
    lines += [_short(g, data.get("roofline", {}))[:200] for g in kept[:room]]
    left_out = [x for name in ("core", "models") for x in data.get(name, {}).get("out_of_time", [])]
    lines.append(f"{len(groups) - len(kept[:room])} further groups in run.json; left out for time: {len(left_out)}")
    text = "\n".join([*lines[:39], *plan(ended, 560)[:1]]) + "\n"
    (out / "summary.txt").write_text(text)
    print(text, end="")
    return 0
