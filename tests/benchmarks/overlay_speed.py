"""Milliseconds a frame of the video's pictures: Overlay.render() against the same content drawn with matplotlib.

    python tests/benchmarks/overlay_speed.py
    python tests/benchmarks/overlay_speed.py --pictures /tmp/pictures

Both draw Breakout and the panel beside it, 960x630, with 4 actions and with all 18; game, Q-values and texts change
from frame to frame, and the trace is full (150 values). Matplotlib is used as well as it can be: Agg, no axes, artists
made once and changed in place, the constant ones drawn once and restored; in a second variant OpenCV pastes the game
in, since an image artist takes long. The faster variant counts. --pictures keeps one picture of each.

Recorder.write is the drawing and the encoding: ffmpeg encodes in a process of its own, but writing waits for it.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from common import MISSING, median_ratio, play_rounds, print_machine, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dqn_atari  # noqa: E402
from dqn_atari import Overlay, number  # noqa: E402

rng = np.random.default_rng(1)


def make_overlay(full_action_space: bool) -> Overlay:
    overlay = Overlay(
        dqn_atari.Atari(dqn_atari.Args(env_id="Breakout", full_action_space=full_action_space)),
        subtitle="dqn_atari \u2022 step 1,250,000",
        epsilon=0.01,
    )
    overlay.reset(seed=1)
    while len(overlay.values) < dqn_atari.TRACE_STEPS:  # a trace starts anew with every game
        play(overlay)
    return overlay


def play(overlay: Overlay) -> None:
    """One random step, with Q-values that differ in all their digits; every 8th action is not the greedy one."""
    q_values = 2 + rng.normal(scale=0.1, size=overlay.action_space.n)
    explore = rng.random() < 1 / 8
    overlay.note(q_values, int(rng.integers(len(q_values)) if explore else q_values.argmax()))
    _, _, terminated, truncated, _ = overlay.step(overlay.action)
    if terminated or truncated:
        overlay.env.reset()  # not the overlay's own: that would empty the trace


def matplotlib_drawer(overlay: Overlay, paste: bool) -> Callable[[], np.ndarray]:
    """A function that does what ``overlay.render`` does, with the same places, sizes and colors.

    The game is an image artist, or with ``paste`` it is enlarged by OpenCV and copied into the finished picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    def rgb(color):
        return tuple(channel / 255 for channel in color)

    ground, quiet, grid, bar = map(rgb, (dqn_atari.GROUND, dqn_atari.QUIET, dqn_atari.GRID, dqn_atari.BAR))
    greedy_color, chosen_color, bright = map(rgb, (dqn_atari.GREEDY, dqn_atari.CHOSEN, dqn_atari.TEXT))
    gain, loss = map(rgb, (dqn_atari.GAIN, dqn_atari.LOSS))
    width, height, left, right = overlay.WIDTH, overlay.HEIGHT, overlay.LEFT, overlay.RIGHT
    names, env = overlay.env.action_names, overlay.env
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor=ground)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # one unit is one pixel, y downwards
    axes.set_axis_off()
    constant, changing = [], []

    def text(x, y, content, color, size, bold=False, align="left", artists=changing):
        weight = "bold" if bold else "normal"
        points = size * 0.72 * 0.85  # pixels to points; matplotlib's own font runs wider
        options = {"fontsize": points, "fontweight": weight, "ha": align, "va": "baseline", "parse_math": False}
        artists.append(axes.text(x, y, content, color=color, **options))
        return artists[-1]

    text(left, 40, env.game, bright, 22, bold=True, artists=constant)
    text(left, 64, overlay.subtitle, quiet, 14, artists=constant)

    text(left, 90, "Q(s, a)", quiet, 14, artists=constant)
    text(left + 62, 90, "greedy", greedy_color, 14, artists=constant)
    taken = text(left + 120, 90, "", chosen_color, 14)
    span = text(right, 90, "", quiet, 14, align="right")
    pitch = min(36, 324 // len(names))
    size, bar_left, bar_width = min(15, pitch - 4), left + 126, 244
    tops = [104 + i * pitch for i in range(len(names))]
    bars = [Rectangle((bar_left, y + 3), 1, pitch - 7, antialiased=False) for y in tops]
    frame = Rectangle((bar_left - 4, 0), bar_width + 8, pitch - 1, fill=False, edgecolor=chosen_color, linewidth=1.44)
    for patch in (*bars, frame):
        axes.add_patch(patch)
    changing += [*bars, frame]
    baselines = [y + (pitch + size) // 2 - 2 for y in tops]
    labels = [text(left, y, name, quiet, size) for y, name in zip(baselines, names)]
    numbers = [text(right, y, "", quiet, size, align="right") for y in baselines]

    top, bottom = 466, 548
    text(left, top - 14, "V(s) = max Q, last 10 s", quiet, 14, artists=constant)
    text(left + 165, top - 14, "reward", gain, 14, artists=constant)
    text(left + 224, top - 14, "penalty", loss, 14, artists=constant)
    limits = text(right, top - 14, "", quiet, 14, align="right")
    constant.append(axes.add_line(Line2D((left, right), (bottom, bottom), color=grid, linewidth=0.72)))
    events = axes.add_collection(LineCollection([], linewidths=0.72))
    trace = axes.add_line(Line2D([], [], color=greedy_color, linewidth=1.44))
    changing += [events, trace]

    facts = []
    for x, name in zip((0, 100, 180, 262, 392), ("return", "step", "epsilon", "repeated rewards", "lives")):
        text(left + x, 581, name, quiet, 14, artists=constant)
        facts.append(text(left + x, 604, "", bright, 18, bold=True))

    picture = np.empty((height, width, 3), np.uint8)
    if not paste:
        extent = (0, width // 2, height, 0)
        changing.append(game := axes.imshow(env.screen(), extent=extent, aspect="auto", interpolation="nearest"))
        axes.set(xlim=(0, width), ylim=(height, 0))  # imshow changes them
    for artist in changing:
        artist.set_animated(True)  # left out of draw()
    figure.canvas.draw()
    background = figure.canvas.copy_from_bbox(figure.bbox)

    def draw() -> np.ndarray:
        taken.set_text("taken" if overlay.action == overlay.greedy else "exploring")
        low, high = overlay.q_values.min(), overlay.q_values.max()
        span.set_text(f"full bar: lowest + {number(high - low)}")
        for i, value in enumerate(overlay.q_values.tolist()):
            bars[i].set_width(max(bar_width * (value - low) / (high - low), 1))
            bars[i].set_facecolor(greedy_color if i == overlay.greedy else bar)
            marked = i in (overlay.action, overlay.greedy)
            numbers[i].set_text(number(value))
            for artist in (labels[i], numbers[i]):
                artist.set_color(bright if marked else quiet)
                artist.set_fontweight("bold" if marked else "normal")
        frame.set_y(tops[overlay.action])

        values, rewards = np.array(overlay.values), np.diff([*overlay.returns, env.episode_return])
        low, high = values.min(), values.max()
        limits.set_text(f"{number(low)} to {number(high)}")
        x = right - np.arange(len(values))[::-1] * (right - left) / (dqn_atari.TRACE_STEPS - 1)
        trace.set_data(x, bottom - (values - low) / (high - low) * (bottom - top))
        events.set_segments([[(at, top), (at, bottom)] for at in x[rewards != 0]])
        events.set_color([gain if reward > 0 else loss for reward in rewards[rewards != 0]])

        contents = (f"{env.episode_return:,.0f}", f"{env.episode_length:,}", f"{overlay.epsilon:g}")
        contents += (f"{env.repeated_rewards:.2f}", str(env.lives))
        for fact, content in zip(facts, contents):
            fact.set_text(content)

        screen = env.screen()
        if not paste:
            game.set_data(screen)
        figure.canvas.restore_region(background)
        for artist in changing:
            axes.draw_artist(artist)
        cv2.cvtColor(np.asarray(figure.canvas.buffer_rgba()), cv2.COLOR_RGBA2RGB, dst=picture)
        if paste:
            picture[:, : width // 2] = cv2.resize(screen, (width // 2, height), interpolation=cv2.INTER_NEAREST)
        return picture

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100, help="frames of each contestant a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all contestants (%(default)s)")
    parser.add_argument("--pictures", type=Path, help="folder for one picture of each drawing")
    args = parser.parse_args()
    print_machine()

    def milliseconds(overlay: Overlay, draw: Callable, frames: int) -> float:
        total = 0.0
        for _ in range(frames):
            play(overlay)
            start = time.perf_counter()
            draw()
            total += time.perf_counter() - start
        return 1000 * total / frames

    contestants, recorders = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for num_actions in (4, 18):
            overlay = make_overlay(full_action_space=num_actions == 18)
            recorders.append(dqn_atari.Recorder(Path(folder) / f"{num_actions}.mp4", sys.maxsize))
            draws = {"Overlay.render": overlay.render}
            if importlib.util.find_spec("matplotlib"):
                draws["matplotlib"] = matplotlib_drawer(overlay, paste=False)
                draws["matplotlib, game pasted"] = matplotlib_drawer(overlay, paste=True)
            elif num_actions == 4:
                print(f"matplotlib: {MISSING}")
            if args.pictures:
                args.pictures.mkdir(parents=True, exist_ok=True)
                for name, draw in draws.items():
                    cv2.imwrite(str(args.pictures / f"{name}_{num_actions}.png"), draw()[..., ::-1])
            draws["Recorder.write"] = partial(recorders[-1].write, overlay)
            for name, draw in draws.items():
                milliseconds(overlay, draw, 10)  # fonts and ffmpeg are loaded by the first frames
                contestants[name, num_actions] = partial(milliseconds, overlay, draw, args.frames)
        figures = play_rounds(contestants, args.rounds)
        for recorder in recorders:
            recorder.close()

    names = dict.fromkeys(name for name, _ in figures)
    rows = [(name, *(f"{statistics.median(figures[name, n]):.2f}" for n in (4, 18))) for name in names]
    print_table((f"ms a frame, {args.rounds} rounds", "4 actions", "18 actions"), rows)
    peers = [name for name in names if name.startswith("matplotlib")]
    if peers:
        four, eighteen = (
            min(median_ratio(figures[peer, n], figures["Overlay.render", n]) for peer in peers) for n in (4, 18)
        )
        print(f"ratio: {four:.1f} x matplotlib with 4 actions, {eighteen:.1f} x with 18")
    else:
        print("ratio: no matplotlib")


if __name__ == "__main__":
    main()
