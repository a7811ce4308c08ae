"""Agent steps per second of apex_dqn_atari.py's actors on Breakout: alone, under Ray, and beside a learner.

    python tests/benchmarks/apex_speed.py
    python tests/benchmarks/apex_speed.py --num-actors 14 --steps 100000 --rounds 1

"alone" is the same actors in plain processes, with neither Ray nor a learner: nobody takes what they have played. The
others are the script as from the shell; charts/SPS and charts/updates_per_second are read from the W&B file. They take
turns. More tables have the parts of an actor's step and of the learner's work, one by one on one thread.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from functools import partial

import numpy as np
import torch
from common import ROOT, median_ratio, play_rounds, print_machine, print_table, script_metrics

sys.path.insert(0, str(ROOT))
from apex_dqn_atari import CHUNK, Actor, Agent, Args, Replay  # noqa: E402

FIRST_STEP = 4000  # those before it are left out
SMALL = "--buffer-size 50000 --batch-size"


def play_alone(args: Args, number: int, chunks: int, ready, results) -> None:
    """Body of a process: ``chunks`` chunks of one actor, and how long they took."""
    torch.set_num_threads(1)
    actor, weights = Actor(args, number, 0), Agent(args, 4, torch.device("cpu")).weights()
    actor.play(weights, 0)
    ready.wait()
    started = time.perf_counter()
    for _ in range(chunks):
        actor.play(weights, 0)
    results.put(time.perf_counter() - started)


def alone(num_actors: int, envs_per_actor: int, steps: int) -> float:
    """The sum of the actors' rates, so that one that ends early is not counted as idle."""
    args = Args(env_id="Breakout", num_actors=num_actors, envs_per_actor=envs_per_actor)
    chunks = max(steps // num_actors // envs_per_actor // CHUNK, 1)
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(num_actors), context.Queue()
    workers = [
        context.Process(target=play_alone, args=(args, i, chunks, ready, results), daemon=True)
        for i in range(num_actors)
    ]
    for worker in workers:
        worker.start()
    seconds = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(chunks * CHUNK * envs_per_actor / s for s in seconds)


def script(num_actors: int, envs_per_actor: int, steps: int, flags: str) -> tuple[float, float]:
    """Steps and updates a second."""
    flags += f" --num-actors {num_actors} --envs-per-actor {envs_per_actor}"
    records = script_metrics("apex_dqn_atari.py", flags, FIRST_STEP, steps)
    sps, ups = ([record[f"charts/{name}"] for record in records] for name in ("SPS", "updates_per_second"))
    return statistics.harmonic_mean(sps), statistics.mean(ups)


def milliseconds(function, repeats: int) -> float:
    """Median time of a call, the first left out."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:])


def print_parts(envs_per_actor: int) -> None:
    """Where the time of an actor and of the learner goes, each part alone on one thread."""
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    args = Args(env_id="Breakout", num_actors=1, envs_per_actor=envs_per_actor, buffer_size=100_000)
    agent, actor, replay = Agent(args, 4, cpu), Actor(args, 0, 0), Replay(args, cpu)
    weights, chunk = agent.weights(), None
    for i in range(40):
        chunk = actor.play(weights, 0)
        replay.add(0, chunk, i > 0)
    chunk = {name: np.copy(x) if isinstance(x, np.ndarray) else x for name, x in chunk.items()}
    observations = torch.from_numpy(actor.observations)
    rng = np.random.default_rng(0)

    def emulate() -> None:
        for env, action in zip(actor.envs, rng.integers(4, size=len(actor.envs))):
            if any(env.step(int(action))[2:4]):
                env.reset()

    whole = milliseconds(lambda: actor.play(weights, 0), 10) / CHUNK
    with torch.inference_mode():
        forward = milliseconds(lambda: actor.network(observations).numpy(), 200)
    emulators = milliseconds(emulate, 200)
    rows = [(f"a step of {envs_per_actor} games", f"{whole:.2f}", "")]
    for name, part in (("emulators", emulators), ("network", forward), ("all else", whole - emulators - forward)):
        rows.append((f"  {name}", f"{part:.2f}", f"{part / whole:.0%}"))
    print_table(("an actor", "ms", "share"), rows)

    rows = [("store a chunk", f"{milliseconds(lambda: replay.add(0, chunk, True), 50):.2f}", "")]
    for size in (32, 512):
        *batch, indices = replay.sample(size)
        repeats = 2000 // size
        rows += [(f"sample {size}", f"{milliseconds(lambda size=size: replay.sample(size), repeats):.2f}", "")]
        rows += [(f"update of {size}", f"{milliseconds(lambda batch=batch: agent.update(*batch), repeats):.2f}", "")]
        td_errors = torch.rand(size)
        set_priorities = partial(replay.update_priorities, indices, td_errors)
        rows += [(f"priorities of {size}", f"{milliseconds(set_priorities, 50):.2f}", "")]
    priorities = torch.rand(2_000_000)
    total = milliseconds(lambda: priorities.cumsum(0, dtype=torch.float64), 20)
    rows += [("sum over two million priorities", f"{total:.2f}", "")]
    print_table(("the learner, one thread", "ms", ""), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-actors", type=int, default=1, help="actors (%(default)s)")
    parser.add_argument("--envs-per-actor", type=int, default=8, help="games of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=40_000, help="steps on the clock (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all contestants (%(default)s)")
    args = parser.parse_args()
    print_machine()
    games = (args.num_actors, args.envs_per_actor, args.steps)
    updates = {}

    def speed(name: str, flags: str) -> float:
        sps, updates_per_second = script(*games, flags)
        updates.setdefault(name, []).append(updates_per_second)
        return sps

    contestants = {
        "alone": partial(alone, *games),
        "under Ray, nobody learns": f"{SMALL} 32 --learning-starts 1000000000",
        "beside a learner, batch 512": f"{SMALL} 512 --learning-starts 2000",
        "beside a learner, batch 32": f"{SMALL} 32 --learning-starts 2000",
    }
    contestants = {
        name: flags if callable(flags) else partial(speed, name, flags) for name, flags in contestants.items()
    }
    figures = play_rounds(contestants, args.rounds)
    rows = []
    for name, rates in figures.items():
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        ups = f"{statistics.median(updates[name]):.1f}" if name in updates else "-"
        ratio = f"{median_ratio(rates, figures['alone']):.2f} x"
        rows.append((name, f"{statistics.median(rates):,.0f}", spread, ratio, ups))
    header = (f"{args.num_actors} x {args.envs_per_actor} games, {args.rounds} rounds", "steps/s", "range", "of alone",
              "updates/s")  # fmt: skip
    print_table(header, rows)
    print_parts(args.envs_per_actor)


if __name__ == "__main__":
    main()
