"""Which figure tells an agent that farms, one that earns one reward again and again, from one that plays on?

    python tests/benchmarks/farming.py
    python tests/benchmarks/farming.py --games Breakout Pong --steps 3000 --seeds 1 2
    python tests/benchmarks/farming.py --cost

Nobody is trained here: each player is a rule or a search, so that it is known what it does. Its kind says it:

    honest     plays on; a search tries random actions in a saved emulator and takes those that pay most
    stays      never leaves its place: as far as the game itself lets a rule farm
    restored   a farmer made by hand: after each lap the emulator goes back to the lap's start and only the score goes
               on; "late" laps begin after 20 rewards, "shaky" ones have every tenth action drawn at random
    altered    a farmer made by hand: each thing hit is put back at once; the game itself goes on
    perfect    restored, but a trained player does just that: Pong is won with one shot, played 21 times

The measures, all from 0 to 1, and more for a farmer:

    old frames    frames that had occurred before in the game
    old cells     the same for cells as in Go-Explore (Ecoffet et al. 2021): 11x8 pixels, 8 grays
    no news       rewards with no new cell since the last one
    11x8, 14x14   rewards earned in a cell (8 grays) in which one had been earned before
    21x21, 28x28  the same with 4 grays; 28x28 is ``repeated_rewards`` of the scripts
    near          the same with any frame that differs by less than half a gray (of 256), on average, at 11x11 pixels

A reward is a step that pays points (not one that costs some); its frame is the one before that step, so that the score
it adds is not yet in it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ale_py
import cv2
import numpy as np
from common import median_ratio, play_rounds, print_machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dqn_atari import FRAME_SKIP, Args, Atari, undo_rollover  # noqa: E402

SCORES = {  # where the RAM holds the score, so that it can go on after the rest went back
    "BankHeist": (88, 89, 90),
    "Breakout": (76, 77),
    "MsPacman": (120, 121, 122),
    "Pong": (13, 14),
    "Seaquest": (56, 57, 58),
    "SpaceInvaders": (102, 104),
}
BRICKS, INVADERS = range(36), range(17, 24)  # where it holds what is still to be hit


# Measures: functions of a game's frames (uint8 [steps + 1, 84, 84]) and rewards [steps].


def to_cells(frames: np.ndarray, size: tuple[int, int], grays: int) -> list[bytes]:
    return [(cv2.resize(f, size, interpolation=cv2.INTER_AREA) // (256 // grays)).tobytes() for f in frames]


def old_frames(frames: np.ndarray, rewards: np.ndarray) -> float:
    return 1 - len({frame.tobytes() for frame in frames}) / len(frames)


def old_cells(frames: np.ndarray, rewards: np.ndarray) -> float:
    return 1 - len(set(to_cells(frames, (11, 8), 8))) / len(frames)


def no_news(frames: np.ndarray, rewards: np.ndarray) -> float:
    cells, seen, news, count = to_cells(frames, (11, 8), 8), set(), True, 0
    for cell, reward in zip(cells, rewards):
        news |= cell not in seen
        seen.add(cell)
        if reward > 0:
            count += not news
            news = False
    return count / max((rewards > 0).sum(), 1)


def repeated(size: tuple[int, int], grays: int, frames: np.ndarray, rewards: np.ndarray) -> float:
    cells = to_cells(frames[:-1][rewards > 0], size, grays)
    return (len(cells) - len(set(cells))) / max(len(cells), 1)


def near(frames: np.ndarray, rewards: np.ndarray) -> float:
    paid = frames[:-1][rewards > 0]
    small = np.array([cv2.resize(f, (11, 11), interpolation=cv2.INTER_AREA) for f in paid], float).reshape(-1, 121)
    return sum(abs(small[:i] - small[i]).mean(1).min() < 0.5 for i in range(1, len(small))) / max(len(small), 1)


MEASURES = {
    "old frames": old_frames,
    "old cells": old_cells,
    "no news": no_news,
    "11x8": partial(repeated, (11, 8), 8),
    "14x14": partial(repeated, (14, 14), 8),
    "21x21": partial(repeated, (21, 21), 4),
    "28x28": partial(repeated, (28, 28), 4),
    "near": near,
}


# Players: functions of the game and a random generator that return the next action. What makes one is called anew for
# each game.


def act(env: Atari, action: int) -> float:
    """One step of the emulator alone: its reward, much less than nothing if a life is lost."""
    lives = env.ale.lives()
    reward = sum(undo_rollover(env.ale.act(env.emulator_actions[action])) for _ in range(FRAME_SKIP))
    return reward - 1e4 * (env.ale.lives() < lives or env.ale.game_over())


def cycle(*names: str) -> Callable:
    return lambda env, rng: env.action_names.index(names[env.episode_length % len(names)])


def at_random(env: Atari, rng: np.random.Generator) -> int:
    return int(rng.integers(len(env.action_names)))


def search(*names: str, tries: int = 6, horizon: int = 12, commit: int = 5) -> Callable:
    """Takes the best of some random sequences, whose actions are held for 3 steps; only from ``names`` if given."""
    planned = []

    def player(env, rng):
        if not planned:
            actions = [env.action_names.index(name) for name in names or env.action_names]
            sequences = [np.repeat(rng.choice(actions, horizon // 3), 3).tolist() for _ in range(tries)]
            state, returns = env.ale.cloneState(), []
            for sequence in sequences:
                returns.append(sum(act(env, action) * 0.98**i for i, action in enumerate(sequence)))
                env.ale.restoreState(state)
            planned.extend(sequences[int(np.argmax(returns))][:commit])
        return planned.pop(0)

    return player


def follow_in_breakout(env: Atari, offset: int) -> int:
    ram = env.ale.getRAM()
    distance = int(ram[99]) - int(ram[72]) - offset
    name = "FIRE" if ram[101] == 0 else "RIGHT" if distance > 4 else "LEFT" if distance < -4 else "NOOP"
    return env.action_names.index(name)


def follow_in_pong(env: Atari, offset: int) -> int:
    ram = env.ale.getRAM()
    distance = int(ram[54]) - int(ram[51]) - offset
    name = "NOOP" if ram[54] == 0 or abs(distance) <= 10 else "LEFT" if distance > 0 else "RIGHT"
    return env.action_names.index(name)


def aim(follow: Callable, offsets: range, horizon: int = 50, commit: int = 15) -> Callable:
    """Meets the ball with the part of the paddle that pays most in a rollout."""
    offset = None

    def player(env, rng):
        nonlocal offset
        if env.episode_length % commit == 0 or offset is None:
            tried, returns, state = rng.choice(offsets, 6, replace=False), [], env.ale.cloneState()
            for candidate in tried:
                returns.append(sum(act(env, follow(env, candidate)) * 0.99**i for i in range(horizon)))
                env.ale.restoreState(state)
            offset = tried[int(np.argmax(returns))]
        return follow(env, offset)

    return player


class Lap:
    """Plays until a reward whose last ``length`` steps can be played again, then plays them for ever."""

    def __init__(self, player: Callable, length: int = 25, after: int = 3, shaky: float = 0.0):
        self.player, self.length, self.after, self.shaky = player, length, after, shaky
        self.past = []  # the states and actions of the last steps; later those of the lap
        self.paid, self.last_return, self.found, self.step = 0, 0.0, False, 0

    def go_back(self, env: Atari) -> None:
        score = [(address, int(env.ale.getRAM()[address])) for address in SCORES[env.game]]
        env.ale.restoreState(self.past[0][0])
        for address, value in score:
            env.ale.setRAM(address, value)
        env.ale.act(ale_py.Action.NOOP)  # the emulator takes the change of the score for a reward: not counted
        env.lives = env.ale.lives()

    def works(self, env: Atari) -> bool:
        state = env.ale.cloneState()
        self.go_back(env)
        reward = sum(act(env, action) for _, action in self.past)
        env.ale.restoreState(state)
        return reward > 0

    def __call__(self, env: Atari, rng: np.random.Generator) -> int:
        if not self.found:
            if env.episode_return > self.last_return:
                self.paid += 1
                self.found = self.paid >= self.after and len(self.past) == self.length and self.works(env)
            self.last_return = env.episode_return
        if not self.found:
            self.past.append((env.ale.cloneState(), self.player(env, rng)))
            del self.past[: -self.length]
            return self.past[-1][1]
        if self.step % self.length == 0:
            self.go_back(env)
        action = self.past[self.step % self.length][1]
        self.step += 1
        return at_random(env, rng) if rng.random() < self.shaky else action


def put_back(player: Callable, addresses: range) -> Callable:
    """Plays while whatever was hit is put back at once."""
    full, last_return = [], 0.0

    def next_action(env, rng):
        nonlocal full, last_return
        full = full or [int(env.ale.getRAM()[address]) for address in addresses]
        if env.episode_return != last_return:
            for address, value in zip(addresses, full):
                env.ale.setRAM(address, value)
            last_return = env.episode_return
        return player(env, rng)

    return next_action


aim_in_breakout = partial(aim, follow_in_breakout, range(0, 17, 2))
aim_in_pong = partial(aim, follow_in_pong, range(-10, 15, 3))
PLAYERS = {  # of each game: name, kind, what makes the player
    "Breakout": [
        ("aims", "honest", aim_in_breakout),
        ("lap", "restored", lambda: Lap(aim_in_breakout())),
        ("late lap", "restored", lambda: Lap(aim_in_breakout(), after=20)),
        ("shaky lap", "restored", lambda: Lap(aim_in_breakout(), shaky=0.1)),
        ("follows, wall grows back", "altered", lambda: put_back(lambda env, _: follow_in_breakout(env, 8), BRICKS)),
        ("aims, wall grows back", "altered", lambda: put_back(aim_in_breakout(), BRICKS)),
    ],
    "MsPacman": [
        ("search", "honest", search),
        ("left and right", "stays", lambda: cycle(*["LEFT"] * 6, *["RIGHT"] * 6)),
        ("lap", "restored", lambda: Lap(search())),
        ("shaky lap", "restored", lambda: Lap(search(), shaky=0.1)),
    ],
    "SpaceInvaders": [
        ("search", "honest", search),
        ("FIRE", "stays", lambda: cycle("FIRE")),
        ("lap", "restored", lambda: Lap(search())),
        ("shaky lap", "restored", lambda: Lap(search(), shaky=0.1)),
        ("FIRE, invaders come back", "altered", lambda: put_back(cycle("FIRE"), INVADERS)),
    ],
    "Seaquest": [
        ("search", "honest", search),
        ("never surfaces", "stays", lambda: search("LEFTFIRE", "RIGHTFIRE", "DOWNFIRE")),
        ("lap", "restored", lambda: Lap(search())),
        ("shaky lap", "restored", lambda: Lap(search(), shaky=0.1)),
    ],
    "BankHeist": [
        ("search", "honest", search),
        ("lap", "restored", lambda: Lap(search(), after=1)),
        ("shaky lap", "restored", lambda: Lap(search(), after=1, shaky=0.1)),
    ],
    "Pong": [
        ("aims", "honest", aim_in_pong),
        ("one shot for ever", "perfect", lambda: Lap(aim_in_pong(), length=50, after=1)),
    ],
    "Freeway": [("UP", "honest", lambda: cycle("UP"))],
    "Boxing": [("search", "honest", search), ("punches only", "stays", lambda: search("FIRE", "NOOP"))],
    "KungFuMaster": [
        ("search", "honest", search),
        ("kicks only", "stays", lambda: search("NOOP", "LEFTFIRE", "RIGHTFIRE", "DOWNLEFTFIRE", "DOWNRIGHTFIRE")),
    ],
    "CrazyClimber": [("climbs", "honest", lambda: cycle(*["UP"] * 3, *["DOWN"] * 3)), ("search", "honest", search)],
    "DemonAttack": [("search", "honest", search), ("FIRE", "stays", lambda: cycle("FIRE"))],
    "Centipede": [("search", "honest", search)],
    "Krull": [("search", "honest", search), ("FIRE and NOOP", "stays", lambda: cycle("FIRE", "NOOP"))],
    "Qbert": [("search", "honest", search)],
    "Enduro": [("FIRE", "honest", lambda: cycle("FIRE"))],
    "Tennis": [("never serves", "stays", lambda: cycle("NOOP"))],
}


def play(game: str, player: Callable, steps: int, seed: int) -> tuple[Atari, np.ndarray, np.ndarray]:
    """The game after the first ``steps`` of it, or all of it if it ends before; its frames and its rewards."""
    env = Atari(Args(env_id=game, episodic_life=False))
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    frames, returns = [env.stack[-1].copy()], [0.0]
    while len(returns) <= steps and not env.game_ended:
        env.step(player(env, rng))
        frames.append(env.stack[-1].copy())
        returns.append(env.episode_return)
    return env, np.array(frames), np.diff(returns)


def print_row(*fields) -> None:
    cells = [f"{field:.2f}" if isinstance(field, float) else str(field) for field in fields]
    print("|", " | ".join(cells), "|", flush=True)


class Unnoted(Atari):
    """Without ``repeated_rewards``."""

    def _note_reward(self) -> None:
        pass


def print_cost(rounds: int) -> None:
    """How much longer a step takes with repeated_rewards: the same 200 steps with and without, in turns."""

    def seconds(env, player):
        start = time.process_time()
        for _ in range(200):
            env.step(player(env, None))
            if env.game_ended:
                env.reset()
        return time.process_time() - start

    for game, action in (("Breakout", "RIGHT"), ("Krull", "FIRE"), ("Enduro", "FIRE")):
        contestants = {}
        for make in (Unnoted, Atari):
            env = make(Args(env_id=game, episodic_life=False))
            env.reset(seed=1)
            contestants[make] = partial(seconds, env, cycle(action, "NOOP"))
        without, with_it = play_rounds(contestants, rounds).values()
        step, cost = statistics.median(without) / 200, median_ratio(with_it, without) - 1
        print(f"{game}: a step takes {step * 1e3:.2f} ms of CPU, {cost:+.1%} with repeated_rewards", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=list(PLAYERS), choices=list(PLAYERS), metavar="GAME")
    parser.add_argument("--steps", type=int, default=1500, help="most agent steps of a game (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="(%(default)s)")
    parser.add_argument("--cost", action="store_true", help="only measure what repeated_rewards costs")
    parser.add_argument("--rounds", type=int, default=75, help="of --cost (%(default)s)")
    args = parser.parse_args()
    print_machine()
    if args.cost:
        return print_cost(args.rounds)
    print_row("game", "player", "kind", "seed", "steps", "return", "rewards", *MEASURES)
    print_row(*["---"] * (7 + len(MEASURES)))
    farmers, honest = [], []
    for game in args.games:
        for name, kind, make in [("random", "honest", lambda: at_random), *PLAYERS[game]]:
            for seed in args.seeds:
                env, frames, rewards = play(game, make(), args.steps, seed)
                figures = [float(measure(frames, rewards)) for measure in MEASURES.values()]
                assert figures[list(MEASURES).index("28x28")] == env.repeated_rewards
                count = int((rewards > 0).sum())
                print_row(game, name, kind, seed, len(rewards), round(env.episode_return), count, *figures)
                if count >= 5 and kind != "perfect":  # of fewer rewards, a share says nothing
                    (farmers if kind in ("restored", "altered") else honest).append(figures)
    if not farmers or not honest:
        return
    above, below = np.array(farmers)[:, None], np.array(honest)[None]
    higher = ((above > below) + 0.5 * (above == below)).mean((0, 1))
    print(f"\n{len(farmers)} farmers (restored, altered), {len(honest)} others, 5 rewards or more each\n")
    print_row("", *MEASURES)
    print_row(*["---"] * (1 + len(MEASURES)))
    print_row("a farmer's figure is higher than another's: share of pairs", *higher.tolist())
    for title, rows in (("farmers", farmers), ("others", honest)):
        for name, q in (("lowest", 0), ("lower tenth", 0.1), ("median", 0.5), ("upper tenth", 0.9), ("highest", 1)):
            print_row(f"{title}, {name}", *np.quantile(rows, q, axis=0).tolist())


if __name__ == "__main__":
    main()
