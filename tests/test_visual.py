"""The visual laboratory: saliency maps, surprise, every panel read off its pixels, and models of dqn_atari.py."""

import copy
import functools
import itertools
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import random_batch, read_video, run, run_folder, wandb_records
from torch import nn

import dqn_atari_visual
from dqn_atari_visual import (
    BAR,
    CHOSEN,
    FONT,
    GAIN,
    GREEDY,
    GROUND,
    HEAT,
    LIFE,
    LOSS,
    PANELS,
    QUIET,
    SALIENCY,
    SIZE,
    STACK,
    TEXT,
    TRACE_STEPS,
    Agent,
    Args,
    Atari,
    Box,
    Canvas,
    CudaGraph,
    Overlay,
    QNetwork,
    Recorder,
    Tracker,
    check_args,
    evaluate,
    gradient_saliency,
    number,
    perturbation_saliency,
    x_axis,
)

CPU = torch.device("cpu")
UNRECORDED = Tracker(Args(wandb_mode="disabled"), Path("run"))
GAMES = {3: ("Freeway", False), 6: ("Pong", False), 18: ("Seaquest", True)}


@functools.cache
def started_game(env_id: str, full_action_space: bool) -> tuple[Atari, dict]:
    """A game after ``reset`` and its state: what a start costs is paid once for all tests that only draw."""
    game = Atari(Args(env_id=env_id, full_action_space=full_action_space))
    game.reset(seed=1)
    return game, game.state_dict()


def make_overlay(num_actions=6, **flags) -> Overlay:
    """A game that has just been started; it ends the one that was made before in the same emulator."""
    game, full = GAMES[num_actions]
    args = Args(**({"env_id": game, "full_action_space": full} | flags))
    game, state = started_game(args.env_id, args.full_action_space)
    game = copy.copy(game)  # attributes that a test sets are its own
    game.load_state_dict(state)
    env = Overlay(game, "DOUBLE_DQN_WITH_NOISY_NE \u2022 trained 10,000,000 steps", args)
    assert env.action_space.n == num_actions
    return env


def is_color(picture: np.ndarray, color) -> np.ndarray:
    return (picture == np.array(color, np.uint8)).all(-1)


def inside(env: Overlay, name: str, title=30) -> tuple[np.ndarray, Box]:
    """The picture of a panel without its title, and where it lies."""
    box = env.boxes[name]
    box = box._replace(top=box.top + title)
    return env.render()[box.top : box.bottom + 1, box.left : box.right + 1].copy(), box


# --------------------------------------------------------------------------------------------------- saliency


class PatchNetwork(nn.Module):
    """Action 0 looks at one patch of 12x12 pixels, action 1 at another, action 2 at nothing."""

    PATCHES = ((20, 54), (60, 12))  # top, left

    def __init__(self, frame=slice(None), dtype=torch.float32):
        super().__init__()
        self.frame, self.dtype = frame, dtype

    def forward(self, observations):
        x = observations.float()[:, self.frame]
        # squares: blurring noise can only make them fewer
        values = [
            (x[:, :, top : top + 12, left : left + 12] / 255).square().mean((1, 2, 3)) for top, left in self.PATCHES
        ]
        return torch.stack([*values, torch.full_like(values[0], 3.0)], 1)


def noise() -> torch.Tensor:
    return torch.randint(0, 256, (STACK, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("frame", [slice(0, 1), slice(3, 4), slice(None)], ids=["oldest", "newest", "all"])
@pytest.mark.parametrize("method", SALIENCY)
def test_saliency_lights_up_the_patch_and_no_other(method, frame):
    for action, (top, left) in enumerate(PatchNetwork.PATCHES):
        saliency = SALIENCY[method](PatchNetwork(frame), noise(), action)
        assert saliency.dtype == np.float32 and saliency.shape == (SIZE, SIZE)
        patch = np.zeros((SIZE, SIZE), bool)
        patch[top : top + 12, left : left + 12] = True
        peak = np.unravel_index(saliency.argmax(), saliency.shape)
        assert patch[peak]
        # a blurred patch reaches over the edge: masks of sigma 5, one every 6 pixels
        reach = 0 if method == "gradient" else 18
        near = cv2.dilate(patch.astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1))).astype(bool)
        assert saliency[~near].max() < 0.01 * saliency.max()
        assert np.median(saliency[patch]) > 0.2 * saliency.max()
    assert not SALIENCY[method](PatchNetwork(frame), noise(), 2).any()


def test_gradient_saliency_is_the_gradient():
    """Q = sum w x^2: the map is the largest |2 w x| of the four frames."""
    weights = torch.randn(STACK, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    network = lambda x: (weights * x**2).sum((1, 2, 3))[:, None].expand(-1, 2)  # noqa: E731
    expected = (2 * weights * noise()).abs().amax(0)
    np.testing.assert_allclose(gradient_saliency(network, noise(), 1), expected.numpy(), rtol=1e-5)


def test_perturbation_saliency_is_the_papers():
    """Against a loop over patches in float64, with a network whose Q-values are no linear function of the pixels."""
    torch.manual_seed(0)
    network, observation, action = QNetwork(3), noise(), 2
    double = QNetwork(3).double()
    double.load_state_dict(network.state_dict())

    def gaussian(center: float, sigma: float) -> np.ndarray:
        return np.array([np.exp(-((x - center) ** 2) / (2 * sigma**2)) for x in range(SIZE)])

    stack, blurred = observation.numpy().astype(float), np.zeros((STACK, SIZE, SIZE))
    narrow = [gaussian(center, 3) for center in range(SIZE)]
    for y, x in itertools.product(range(SIZE), repeat=2):
        weights = np.outer(narrow[y], narrow[x])
        blurred[:, y, x] = (stack * weights).sum((1, 2)) / weights.sum()
    stacks = [stack]
    for i, j in itertools.product(range(12), repeat=2):
        mask = np.outer(gaussian(7 * i + 3, 5), gaussian(7 * j + 3, 5))
        stacks.append(stack * (1 - mask) + blurred * mask)
    with torch.no_grad():
        q_values = double.head(double.trunk(torch.from_numpy(np.stack(stacks)) / 255))[:, action].numpy()
    scores = np.array([0.5 * (q_values[0] - q_value) ** 2 for q_value in q_values[1:]]).reshape(12, 12)
    saliency = perturbation_saliency(network, observation, action)
    expected = cv2.resize(scores, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(saliency, expected, rtol=0.02, atol=0.002 * expected.max())
    np.testing.assert_allclose(saliency[3::7, 3::7], scores, rtol=0.02, atol=0.002 * scores.max())
    assert saliency.max() == saliency[3::7, 3::7].max()


def test_perturbation_in_bfloat16_finds_the_same_places():
    torch.manual_seed(3)
    network, rough = QNetwork(4), QNetwork(4, torch.bfloat16)
    rough.load_state_dict(network.state_dict())
    for seed in range(3):
        torch.manual_seed(seed)
        exact, about = (perturbation_saliency(x, noise(), 1) for x in (network, rough))
        assert np.corrcoef(exact.ravel(), about.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("method", SALIENCY)
def test_saliency_leaves_gradients_and_parameters_alone(method):
    agent = Agent(Args(precision="bfloat16"), 4, CPU)
    agent.update(*random_batch(size=8, num_actions=4))
    before = [(x.clone(), x.grad.clone()) for x in agent.q_network.parameters()]
    saliency = SALIENCY[method](agent.q_network, noise(), 1)
    assert np.isfinite(saliency).all() and saliency.min() >= 0 and saliency.max() > 0
    for (value, gradient), parameter in zip(before, agent.q_network.parameters()):
        assert torch.equal(value, parameter) and torch.equal(gradient, parameter.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("method", SALIENCY)
def test_saliency_on_cuda_equals_the_cpu(method, monkeypatch):
    """Also between the replays of a captured update, which goes on as it does without."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    agents = []
    for _ in range(2):
        torch.manual_seed(0)
        agents.append(Agent(Args(precision="float32"), 4, torch.device("cuda")))
    watched, alone = agents
    updates = [CudaGraph(agent.update) for agent in agents]
    on_cpu, batch = QNetwork(4), [x.cuda() for x in random_batch(num_actions=4)]
    for _ in range(8):
        for update in updates:
            update(*batch)
        on_cpu.load_state_dict(watched.q_network.state_dict())
        saliency, expected = (
            SALIENCY[method](network, noise().to(device), 1)
            for network, device in ((watched.q_network, "cuda"), (on_cpu, "cpu"))
        )
        np.testing.assert_allclose(saliency, expected, rtol=0.05, atol=0.01 * expected.max())
    for ours, theirs in zip(watched.q_network.parameters(), alone.q_network.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------- what is noted


@pytest.mark.parametrize(
    "game, episodic_life, max_episode_frames",
    [("Breakout", True, 108_000), ("Breakout", False, 108_000), ("Seaquest", True, 108_000), ("Seaquest", True, 800)],
)
def test_surprise_is_the_td_error(game, episodic_life, max_episode_frames):
    """r + gamma (1 - terminated) max Q(s') - Q(s, a), with the clipped reward, over the end of a life and of a game."""
    args = Args(env_id=game, episodic_life=episodic_life, gamma=0.9, max_episode_frames=max_episode_frames)
    env = Overlay(Atari(args), "", args)
    rng, expected, clipped, lives, rewards = np.random.default_rng(2), [], 0.0, [], []
    env.reset(seed=3)
    reward, terminated, previous = 0.0, True, 0.0
    while True:
        q_values = rng.normal(size=env.action_space.n).astype(np.float32)
        action = int(rng.integers(env.action_space.n))
        expected.append(reward + (0.0 if terminated else 0.9 * max(q_values)) - previous)
        env.note(q_values, action)
        lives.append(env.env.lives)
        before = env.env.episode_return
        _, reward, terminated, truncated, info = env.step(action)
        assert reward in (-1, 0, 1)
        rewards.append(env.env.episode_return - before)
        previous, clipped = q_values[action], clipped + reward
        assert env.clipped_return == clipped
        if info:
            q_values = rng.normal(size=env.action_space.n).astype(np.float32)
            env.end(q_values)
            last = env.steps[-1]
            assert truncated == (max_episode_frames == 800) and terminated != truncated
            assert last.surprise == pytest.approx(reward + truncated * 0.9 * max(q_values) - previous, rel=1e-5)
            assert (last.reward, last.life_lost) == (rewards[-1], env.env.lives < lives[-1])
            assert np.array_equal(last.q_values, q_values) if truncated else np.isnan(last.q_values).all()
            break
        if terminated:
            assert episodic_life
            env.reset()
        if len(lives) % 40 == 0 or terminated:
            shown = [step.surprise for step in env.steps]
            np.testing.assert_allclose(shown, expected[-TRACE_STEPS:], rtol=1e-5, atol=1e-6)
            assert [step.life_lost for step in env.steps] == [
                now < before for before, now in zip([lives[0], *lives], lives)
            ][-TRACE_STEPS:]
    assert last.life_lost != truncated
    assert max(rewards) >= 1 and (truncated or len(set(lives)) > 2)
    assert game != "Seaquest" or max(rewards) > 1  # clipped and true reward differ
    if not episodic_life:
        assert len(env.steps) == min(len(lives), TRACE_STEPS)
    env.reset()  # the next game
    env.note(q_values, action)
    assert len(env.steps) == 1 and env.steps[0].surprise == 0 and env.clipped_return == 0 and env.notice == ""


def test_histories_are_bounded():
    env = make_overlay(18)
    for step in range(3 * TRACE_STEPS):
        env.note(np.zeros(18, np.float32), step % 18)
    assert len(env.steps) == TRACE_STEPS and env.steps[-1].action == (3 * TRACE_STEPS - 1) % 18


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.slow
def test_evaluation_leaves_no_trace(tmp_path, device):
    """Random states, gradients, parameters and optimizer are what they were."""
    args = Args(env_id="Pong", eval_episodes=1, max_episode_frames=40, video_length=3, precision="bfloat16")
    device = torch.device(device)
    agent = Agent(args, 6, device)
    agent.update(*(x.to(device) for x in random_batch(size=8, num_actions=6)))

    def state():
        tensors = [*agent.q_network.parameters(), *(x.grad for x in agent.q_network.parameters())]
        tensors += agent.metrics.state_dict().values()
        tensors += [x for values in agent.optimizer.state_dict()["state"].values() for x in values.values()]
        generators = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        return [*generators, *tensors], (np.random.get_state()[1].tolist(), random.getstate())

    for method in ("perturbation", "gradient"):
        args.saliency = method
        tensors, others = state()
        tensors = [x.clone() for x in tensors]
        evaluate(args, agent, 100, tmp_path, UNRECORDED)
        assert all(map(torch.equal, tensors, state()[0])) and others == state()[1]
    meta, frames = read_video(tmp_path / "videos" / "0000000100.mp4")
    assert (meta["size"], len(frames)) == ((1280, 720), 3) and meta["pix_fmt"].startswith("yuv420p")


@pytest.mark.slow
def test_saliency_is_computed_only_for_pictures(tmp_path, monkeypatch):
    calls, shown, calls_map = [], [], np.ones((SIZE, SIZE), np.float32)
    monkeypatch.setitem(SALIENCY, "gradient", lambda *inputs: calls.append(inputs) or calls_map)
    heat = PANELS["game"].heat
    monkeypatch.setattr(PANELS["game"], "heat", lambda self, state: shown.append(state.saliency) or heat(self, state))
    args = Args(env_id="Pong", eval_episodes=2, max_episode_frames=60, video_length=8, saliency="gradient")
    args.precision, args.eval_epsilon = "float32", 0.5  # the map is that of the greedy action, not of the one taken
    agent = Agent(args, 6, CPU)
    evaluate(args, agent, 0, tmp_path, UNRECORDED)
    assert len(calls) == 8
    for network, observation, action in calls:
        assert network is agent.q_network and action == agent.think(observation)[1]
    assert len(shown) == 8 and all(saliency is calls_map for saliency in shown)
    for flags in ({"capture_video": False}, {"saliency": "none"}, {"panels": ("q_values", "facts")}):
        calls.clear()
        evaluate(Args(**(vars(args) | flags)), agent, 1, tmp_path, UNRECORDED)
        assert not calls


# ---------------------------------------------------------------------------------------------- what is filmed


@pytest.fixture
def film(monkeypatch, tmp_path):
    """Evaluates with the flags given; returns what the overlay knew at each picture, and the agent."""
    pictures, render = [], Overlay.render

    def note_and_render(env):
        game, last = env.env, env.steps[-1]
        known = {"ended": game.game_ended, "total": game.episode_return, "at": game.episode_length, "last": last}
        pictures.append(SimpleNamespace(**vars(env) | known, frames=game.stack.copy()))
        return render(env)

    def evaluate_with(**flags):
        args = Args(**({"saliency": "none", "precision": "float32", "eval_epsilon": 0.5, "panels": ("game",)} | flags))
        agent = Agent(args, int(Atari(args).action_space.n), CPU)
        evaluate(args, agent, 0, tmp_path, UNRECORDED)
        return pictures, agent

    monkeypatch.setattr(Overlay, "render", note_and_render)
    return evaluate_with


def test_last_picture_is_the_end_of_the_game(film, monkeypatch, capsys):
    steps, step = [], Atari.step

    def note_and_step(game, action):
        outcome = step(game, action)
        steps.append((game.recording, outcome[-1]))
        return outcome

    monkeypatch.setattr(Atari, "step", note_and_step)
    (*before, last), _ = film(env_id="Breakout", eval_episodes=2)
    assert (last.ended, last.notice) == (True, "game over")
    assert not any(picture.ended or picture.notice for picture in before)
    # nothing can be gained any more, and what the last action was worth is lost
    assert last.last.surprise == pytest.approx(-before[-1].q_values[before[-1].action]) and last.last.life_lost
    infos = [info for _, info in steps if info]
    assert (last.total, last.at) == (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) and len(infos) == 2
    # every picture but the first is that of a step, and the second game is not recorded
    recorded = [recording for recording, _ in steps]
    assert recorded == [True] * len(before) + [False] * (len(steps) - len(before)) and not recorded[-1]
    assert "cut" not in capsys.readouterr().out


def test_last_picture_of_a_game_that_is_cut_off(film):
    (*before, last), agent = film(env_id="Pong", eval_episodes=1, max_episode_frames=160)
    assert (last.ended, last.notice) == (True, "cut off at the frame limit")
    assert last.at == before[-1].at + 1 <= 40
    value = agent.think(torch.from_numpy(last.frames))[0].max()  # of the observation that nobody acts on
    expected = 0.99 * value - before[-1].q_values[before[-1].action]
    assert last.last.surprise == pytest.approx(expected, abs=1e-6)


def test_a_cut_video_says_so(film, capsys):
    (*before, last), _ = film(env_id="Pong", eval_episodes=1, max_episode_frames=160, video_length=12)
    assert (len(before), last.ended, last.notice) == (11, False, "the video is cut here")
    assert not any(picture.notice for picture in before)
    assert "is cut after 12 steps" in capsys.readouterr().out


@pytest.mark.parametrize("panels", [(), ("game",), ("q_values", "facts"), ("history",)])
def test_the_notice_is_in_the_picture(panels):
    env = make_overlay(panels=panels)
    env.canvas = Recording(*env.canvas.picture.shape[1::-1])
    env.note(np.zeros(6, np.float32), 0)
    for notice in ("the video is cut here", "cut off at the frame limit"):
        env.notice = notice
        env.canvas.texts.clear()
        env.render()
        (box,) = [box for text, box in env.canvas.texts if text == notice]
        assert box.left > 0 and box.right <= env.canvas.picture.shape[1] - 20 and box.bottom <= 720
        for text, other in env.canvas.texts:
            assert text == notice or not overlap(box, other), text


def test_end_of_a_game_has_no_actions():
    env = make_overlay()
    env.canvas = Recording(1280, 720)
    for _ in range(3):
        env.note(np.arange(6, dtype=np.float32), 4)
        env.step(4)
    env.env.game_ended = env.terminated = True
    env.end(np.arange(6, dtype=np.float32))
    picture, _ = inside(env, "q_values", title=0)
    assert not any(is_color(picture, color).any() for color in (GREEDY, CHOSEN, BAR))
    texts = [text for text, _ in env.canvas.texts]
    assert {"game over", "return 0 after 4 steps"} <= set(texts) and "NOOP" not in texts
    history, box = inside(env, "history")
    columns = np.flatnonzero(is_color(history, GREEDY).any(0))  # V(s) stands at the three states, not at the end
    step = (box.right - box.left) / (TRACE_STEPS - 1)
    assert columns.max() == pytest.approx(box.right - box.left - step, abs=2)


# ----------------------------------------------------------------------------------------------------- panels


def test_game_is_what_the_network_sees():
    """The maximum of the last two emulator frames: sprites that flicker are in the picture."""
    env = make_overlay(env_id="YarsRevenge", full_action_space=True, num_actions=18, saliency="none")
    env.env.recording = True
    missing = 0
    for step in range(20):
        env.step(step % 18)
        env.note(np.zeros(18, np.float32), 0)
        screen = env.render()[1:630:3, 1:480:3]
        np.testing.assert_array_equal(screen, env.env.screen())
        missing += (screen != env.env.ale.getScreenRGB()).any(2).sum()
    assert missing > 1000


HEATS = {"gradient": lambda change: change / 255, "perturbation": lambda change: change**2 / 2}


@pytest.mark.parametrize("q_value, least", [(0.0, 0.01), (-0.4, 0.01), (30.0, 0.3), (-30.0, 0.3)])
@pytest.mark.parametrize("method", SALIENCY)
def test_heat_is_as_strong_as_what_it_shows(method, q_value, least):
    """Full color where the Q-value moves by a hundredth or more, fainter where the most it moves is less.

    With blurring, the color is the square, as the paper's map is. The action is the greedy one, not the one taken.
    """
    env = make_overlay(saliency=method)
    env.canvas = Recording(1280, 720)
    q_values = np.full(6, q_value - 1, np.float32)
    q_values[4] = q_value
    env.note(q_values, 0)
    screen = env.render()[1:630:3, 1:480:3].copy()
    np.testing.assert_array_equal(screen, env.env.screen())
    power = 1 if method == "gradient" else 2
    for share in (100, 1, 0.5, 0.2):
        opacity = 0.8 * min(share, 1) ** power
        spot = np.zeros((SIZE, SIZE), np.float32)
        spot[40:44, 60:64] = HEATS[method](share * least)
        env.note(q_values, 0, spot)
        env.canvas.texts.clear()
        shown = env.render()[1:630:3, 1:480:3].astype(int)
        changed = np.argwhere(np.abs(shown - screen).sum(2) > 0)
        assert changed.min(0).tolist() == pytest.approx([40 * 2.5, 60 * 160 / 84], abs=4)
        assert changed.max(0).tolist() == pytest.approx([44 * 2.5, 64 * 160 / 84], abs=4)
        expected = screen[105, 118] + opacity * (np.array(HEAT) - screen[105, 118])
        np.testing.assert_allclose(shown[105, 118], expected, atol=1.5)
        (caption,) = [text for text, _ in env.canvas.texts if "full color" in text]
        assert f"up to {share * least:.2g}" in caption
        assert caption.endswith(f"full color at {max(share, 1) * least:.2g}")
        assert any(f"Q(s, {env.env.action_names[4]})" in text for text, _ in env.canvas.texts)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_flat_and_broken_saliency_leave_the_game_as_it_is(value):
    env = make_overlay()
    env.note(np.zeros(6, np.float32), 0, np.full((SIZE, SIZE), value, np.float32))
    np.testing.assert_array_equal(env.render()[1:630:3, 1:480:3], env.env.screen())


@pytest.mark.parametrize("num_actions", [3, 6, 18])
@pytest.mark.parametrize("scale, shift", [(1, 0), (1, -5), (1e-3, 2), (1e8, 0), (1e30, -1e30)])
def test_bars_show_the_values(num_actions, scale, shift):
    """Lengths are proportional to the distance from the lowest value; greedy and taken action are marked."""
    env = make_overlay(num_actions)
    env.canvas = Recording(1280, 720)
    q_values = (np.random.default_rng(num_actions).normal(size=num_actions) * scale + shift).astype(np.float32)
    for taken in (int(q_values.argmax()), int(q_values.argmin())):
        env.note(q_values, taken)
        picture, box = inside(env, "q_values")
        pitch, width = min(44, 344 // num_actions), box.right - box.left - 136 - 104
        expected = (q_values.astype(float) - q_values.min()) / (q_values.astype(float).max() - q_values.min())
        for i in range(num_actions):
            row = picture[i * pitch + pitch // 2, 136 : 136 + width + 1]
            color = GREEDY if i == q_values.argmax() else BAR
            assert is_color(row, color).sum() == pytest.approx(1 + width * expected[i], abs=2)
            assert not is_color(row, BAR if color == GREEDY else GREEDY).any()
        rows = np.flatnonzero(is_color(picture[:, 140:200], CHOSEN).any(1))
        assert (rows.min(), rows.max()) == pytest.approx((taken * pitch, (taken + 1) * pitch - 1), abs=2)
        texts = [text for text, _ in env.canvas.texts]
        names = env.env.action_names
        rows = [texts[texts.index(name) :][:2] for name in names]
        assert rows == [[name, number(value)] for name, value in zip(names, q_values.tolist())]
        assert f"bars span {q_values.astype(float).max() - q_values.min():.2g}" in texts
        assert ("taken" in texts) == (taken == q_values.argmax()) != (texts.count("exploring") == 2)  # History has one
        env.canvas.texts.clear()


@pytest.mark.parametrize("num_actions", [3, 18])
def test_nan_and_infinite_values_are_drawn(num_actions):
    env = make_overlay(num_actions)
    for q_values in (np.full(num_actions, np.nan), np.full(num_actions, np.inf), np.arange(num_actions) * np.nan):
        env.note(q_values.astype(np.float32), 0)
        env.render()
    some = np.arange(num_actions, dtype=np.float32)
    some[0] = np.nan
    env.note(some, 1, np.full((SIZE, SIZE), np.nan, np.float32))
    env.render()
    env.note(np.linspace(-3e38, 3e38, num_actions, dtype=np.float32), 0)
    env.render()


def test_frames_are_those_the_network_sees():
    env = make_overlay()
    for action in (2, 3, 2, 2, 3):
        env.note(np.zeros(6, np.float32), action)
        observation, *_ = env.step(action)
    env.note(np.zeros(6, np.float32), 0)
    picture, _ = inside(env, "frames")
    assert not np.array_equal(observation[2], observation[3])
    for i, (top, left) in enumerate(((0, 0), (0, 176), (176, 0), (176, 176))):  # twice their size, newest last
        shown = picture[top : top + 168, left : left + 168]
        for part in (shown[::2, ::2], shown[1::2, 1::2]):
            np.testing.assert_array_equal(part, np.repeat(observation[i][:, :, None], 3, 2))


def test_frames_stand_in_a_row_where_that_makes_them_larger():
    env = make_overlay(panels=("facts", "frames"))
    for action in (2, 3, 2, 2, 3):
        env.note(np.zeros(6, np.float32), action)
        observation, *_ = env.step(action)
    env.note(np.zeros(6, np.float32), 0)
    picture, box = inside(env, "frames")
    size = (box.right - box.left + 8) // 4 - 8
    for i in range(4):
        shown = picture[:size, i * (size + 8) :][:, :size, 0].astype(int)
        expected = cv2.resize(observation[i], (size, size), interpolation=cv2.INTER_NEAREST)
        np.testing.assert_array_equal(shown, expected)


def test_history_is_on_the_time_axis():
    """Every Q-value a line at its height, V(s) the highest, events where they happened."""
    env = make_overlay()
    env.env.lives = 5
    for step in range(TRACE_STEPS):
        env.env.episode_return += {60: 3, 100: -2, 120: 1}.get(step, 0)
        env.env.lives -= step in (30, 120)
        values = np.array([0, 1, 2, 3, 4, 5 + (step >= 75)], np.float32)
        env.note(values, 2 if step == 45 else 5)
    assert [step.reward for step in env.steps if step.reward] == [3, -2, 1]
    picture, box = inside(env, "history")
    height = box.bottom - box.top
    at = lambda step: round((box.right - box.left) * step / (TRACE_STEPS - 1))  # noqa: E731
    for color, events in ((GAIN, (60, 120)), (LOSS, (100,)), (LIFE, (30, 120))):
        columns = np.flatnonzero(is_color(picture, color).sum(0) > height / 2)
        near = [x for step in events for x in range(at(step) - 1, at(step) + 2)]
        assert set(columns) <= set(near) and all(any(abs(x - at(step)) < 2 for x in columns) for step in events)
    clear = [at(step) for step in (10, 20, 52, 85, 90, 110, 140)]
    for column in clear:
        for value in range(5):  # of 0 to 6
            pixel = picture[round(height * (1 - value / 6)), column].astype(int)
            assert np.abs(pixel - QUIET).max() < 30  # the line is smoothed
        value_line = np.flatnonzero(is_color(picture[:, column], GREEDY))
        expected = round(height * (1 - (6 if column > at(75) else 5) / 6))
        assert abs(value_line - expected).max() <= 1
    dots = np.argwhere(is_color(picture, CHOSEN))
    assert dots.mean(0).tolist() == pytest.approx([height * (1 - 2 / 6), at(45)], abs=0.6)
    assert np.ptp(dots, 0).max() <= 9


def test_a_young_game_fills_the_traces_from_the_right():
    env = make_overlay()
    for _ in range(10):
        env.note(np.arange(6, dtype=np.float32), 5)
    picture, box = inside(env, "history")
    columns = np.flatnonzero(is_color(picture, GREEDY).any(0))
    start = (box.right - box.left) * (TRACE_STEPS - 10) / (TRACE_STEPS - 1)
    assert (columns.min(), columns.max()) == (pytest.approx(start, abs=2), box.right - box.left)


def test_surprise_is_drawn_where_and_as_large_as_it_was():
    env = make_overlay()
    surprises = {20: 2.0, 70: -4.0, 149: 1.0}
    for step in range(TRACE_STEPS):
        env.note(np.zeros(6, np.float32), 0)
        env.steps[-1] = env.steps[-1]._replace(surprise=surprises.get(step, 0.0))
    picture, box = inside(env, "surprise")
    zero, found = round((box.bottom - box.top) / 2), {}
    for color, sign in ((GAIN, 1), (LOSS, -1)):
        colored = is_color(picture, color)
        for x in np.flatnonzero(colored.any(0)):
            rows = np.flatnonzero(colored[:, x])
            assert (zero - rows.min() if sign > 0 else rows.max() - zero) == len(rows) - 1
            found[x] = sign * (len(rows) - 1)
    half = (box.bottom - box.top) / 2
    for step, surprise in surprises.items():
        at = round((box.right - box.left) * step / (TRACE_STEPS - 1))
        for x in range(at - 1, min(at + 2, box.right - box.left + 1)):
            assert found.pop(x) == pytest.approx(half * surprise / 4, abs=1)
    assert not found


def test_noise_is_drawn_small():
    """Values that differ by less than a hundredth: flat lines, no bars of surprise, and the scale says why."""
    env = make_overlay(gamma=1.0)
    env.canvas = Recording(1280, 720)
    rng = np.random.default_rng(1)
    for _ in range(TRACE_STEPS):
        env.note(0.027 + rng.uniform(0, 1e-4, 6).astype(np.float32), 0)
    picture, box = inside(env, "history")
    rows = np.flatnonzero(is_color(picture, GREEDY).any(1))
    assert rows.min() > 0.95 * (box.bottom - box.top)
    texts = [text for text, _ in env.canvas.texts]
    assert "0.027 to 0.037" in texts and "now 0.000, full height 0.010" in texts
    assert f"surprise: r + {env.args.gamma:g} max Q(s') - Q(s, a)" in texts
    picture, _ = inside(env, "surprise")
    assert not is_color(picture, GAIN).any() and not is_color(picture, LOSS).any()


def test_every_color_has_its_word():
    env = make_overlay()
    env.canvas = Recording(1280, 720)
    env.note(np.zeros(6, np.float32), 1, np.ones((SIZE, SIZE), np.float32))
    env.render()
    words = {"greedy": GREEDY, "exploring": CHOSEN, "V(s)": GREEDY, "life lost": LIFE}
    words |= {"reward": GAIN, "better": GAIN, "penalty": LOSS, "worse": LOSS}
    assert words.items() <= env.canvas.colors.items()
    assert HEAT in env.canvas.colors.values()


@pytest.mark.parametrize("game, lives", [("Breakout", True), ("Pong", False)])
def test_lives_are_shown_where_there_are_some(game, lives):
    env = Overlay(Atari(Args(env_id=game)), "", Args())
    env.canvas = Recording(1280, 720)
    env.reset()
    env.note(np.zeros(env.action_space.n, np.float32), 0)
    env.render()
    env.env.lives = 0  # of the last life nothing is left
    env.note(np.zeros(env.action_space.n, np.float32), 0)
    env.render()
    assert [text for text, _ in env.canvas.texts].count("lives") == 2 * lives


def test_facts_show_their_numbers():
    """Each is right, and one that changes changes the picture in its column and nowhere else."""
    env = make_overlay()
    env.canvas = Recording(1280, 720)
    env.has_lives = True
    env.note(np.zeros(6, np.float32), 0)
    left, top, right, bottom = env.boxes["facts"]
    starts = [round(share * (right - left)) for share in (0, 0.18, 0.4, 0.53, 0.66, 0.91, 1)]

    def columns(change) -> set[int]:
        before = env.render().copy()
        change()
        changed = (env.render() != before).any(2)
        assert not changed[:top].any() and not changed[:, :left].any()
        x = np.flatnonzero(changed[top:bottom].any(0)) - left
        return set((np.searchsorted(starts, x, "right") - 1).tolist())

    game = env.env
    assert columns(lambda: setattr(game, "episode_return", 77.0)) == {0}
    assert columns(lambda: setattr(env, "clipped_return", 5.0)) == {1}
    assert columns(lambda: setattr(env.args, "eval_epsilon", 0.07)) == {3}
    assert columns(lambda: setattr(game, "num_rewards", 25)) == {4} and game.repeated_rewards == 1
    assert columns(lambda: setattr(game, "lives", 3)) == {5}
    assert 2 in columns(lambda: setattr(game, "episode_length", 1234))
    texts = [text for text, _ in env.canvas.texts][-12:]
    assert dict(zip(texts[::2], texts[1::2])) == {
        "return": "77",
        "clipped return": "5",
        "step": "1,234",
        "epsilon": "0.07",
        "repeated rewards": "1.00",
        "lives": "3",
    }


class Recording(Canvas):
    """Notes where texts stand, left, top, right, bottom, and their colors."""

    def __init__(self, width, height):
        super().__init__(width, height)
        self.texts, self.colors = [], {}

    def text(self, text, x, y, color=TEXT, size=16, weight=400, right=False):
        if text:
            self.colors[text] = color
            left, top, width, height = cv2.getTextSize((0, 0), text, (x, y), FONT, size, weight)
            left -= width if right else 0
            self.texts.append((text, Box(left, top, left + width, top + height)))
        return super().text(text, x, y, color, size, weight, right)


def overlap(a: Box, b: Box) -> bool:
    return a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom


@pytest.mark.parametrize("saliency", ["gradient", "perturbation"])
@pytest.mark.parametrize("most", [999.999, 9_999.9, 999_999, 1.2e30])
@pytest.mark.parametrize("num_actions", [3, 6, 18])
def test_nothing_overlaps(num_actions, most, saliency):
    """With the widest texts: no two of them touch, none touches a picture or a bar, none leaves its panel."""
    env = make_overlay(num_actions, saliency=saliency)
    env.canvas = Recording(1280, 720)
    widest = max(range(num_actions), key=lambda i: len(env.env.action_names[i]))
    for step in range(TRACE_STEPS):
        q_values = np.linspace(-most, -most / 10, num_actions, dtype=np.float32)
        q_values[widest] = most
        env.note(q_values, (widest + step % 2) % num_actions, np.full((SIZE, SIZE), 1.234e-5, np.float32))
    env.env.episode_return, env.env.episode_length, env.clipped_return = -1_234_567, 26_999, -26_999
    env.env.game, env.notice, env.has_lives = "MontezumaRevenge", "cut off at the frame limit", True
    env.render()
    texts = env.canvas.texts
    assert len(texts) > 2 * num_actions + 20
    for (text, a), (other, b) in itertools.combinations(texts, 2):
        assert not overlap(a, b), (text, other)
    for text, a in texts:
        (home,) = [box for box in env.boxes.values() if overlap(a, box)]
        assert a.left >= home.left and a.right <= home.right + 1 and a.bottom <= home.bottom, text
    left, top, right, _ = env.boxes["q_values"]
    bars = Box(left + 132, top + 30, right + 5 - PANELS["q_values"].NUMBERS, 720)  # with the frame around them
    screen, frames = Box(0, 0, 480, 630), env.boxes["frames"]
    frames = frames._replace(top=frames.top + 30)
    traces = [env.boxes[name]._replace(top=env.boxes[name].top + 26) for name in ("history", "surprise")]
    for text, a in texts:
        assert not any(overlap(a, picture) for picture in (screen, frames, *traces)), text
        assert not overlap(a, bars) or a.top > env.boxes["q_values"].bottom, text


def test_panels_stay_in_their_boxes():
    """Each drawn alone: only curves and markers reach over the edge, by their thickness."""
    for num_actions in (3, 18):
        env = make_overlay(num_actions)
        for step in range(TRACE_STEPS):
            env.note(np.random.default_rng(step).normal(size=num_actions).astype(np.float32), step % num_actions)
        for name, panel in env.panels.items():
            env.canvas.picture[:] = GROUND
            panel.draw(env.canvas, env.boxes[name], env)
            drawn = ~is_color(env.canvas.picture, GROUND)
            left, top, right, bottom = env.boxes[name]
            drawn[max(top - 1, 0) : bottom + 6, max(left - 6, 0) : right + 6] = False
            assert not drawn.any(), name


@pytest.mark.parametrize("count", range(1, len(PANELS) + 1))
def test_layout_adapts_to_the_chosen_panels(count):
    game = make_overlay().env
    for names in itertools.combinations(PANELS, count):
        env = Overlay(game, "", Args(panels=names))
        assert set(env.boxes) == set(names)
        env.note(np.arange(6, dtype=np.float32), 5)
        height, width, _ = env.render().shape
        assert width % 2 == height % 2 == 0 and height == 720 and width == (480 if names == ("game",) else 1280)
        for box in env.boxes.values():
            assert 0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height
        for a, b in itertools.combinations(env.boxes.values(), 2):
            assert not overlap(a, b)
        others = [box for name, box in env.boxes.items() if name != "game"]
        if others:  # they fill the width and the height
            assert max(box.bottom for box in others) == 700 and max(box.right for box in others) == 1260
    boxes = make_overlay(panels=("facts", "q_values", "game")).boxes
    assert boxes["facts"].bottom < boxes["q_values"].top  # in the order given


MARGIN_PANEL = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "usage.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("panels", [(), ("game", "margin"), ("margin", "facts")])
def test_adding_a_panel(monkeypatch, panels):
    """The example of docs/usage.md, about ten lines: it is drawn, and nothing else has to know of it."""
    monkeypatch.setattr(dqn_atari_visual, "PANELS", dict(PANELS))
    exec(MARGIN_PANEL, vars(dqn_atari_visual))
    monkeypatch.delattr(dqn_atari_visual, "Margin")
    check_args(Args(env_id="Pong", panels=panels))
    env = make_overlay(panels=panels)
    for step in range(TRACE_STEPS):
        env.note(np.array([0, 1, 2, 3, 4, 5 + step], np.float32), 5)
    picture, box = inside(env, "margin")
    line = is_color(picture, GAIN)
    heights = [np.flatnonzero(line[:, x]).mean() for x in range(10, box.right - box.left - 10, 25)]
    assert heights == sorted(heights, reverse=True) and heights[0] - heights[-1] > 0.8 * (box.bottom - box.top)
    for a, b in itertools.combinations(env.boxes.values(), 2):
        assert not overlap(a, b)


def test_time_axis():
    box = Box(10, 0, 308, 50)
    assert x_axis(box, TRACE_STEPS).tolist() == list(range(10, 309, 2))
    assert x_axis(box, 3).tolist() == [304, 306, 308]


def test_video_of_the_canvas_is_the_canvas(tmp_path):
    env, recorder, pictures = make_overlay(), Recorder(tmp_path / "game.mp4", 10), []
    for step in range(10):
        env.note(np.random.default_rng(step).normal(size=6).astype(np.float32), step % 6)
        recorder.write(env)
        pictures.append(env.render().copy())
        env.step(step % 6)
    recorder.close()
    _, frames = read_video(recorder.path)
    assert len(frames) == 10
    for frame, picture in zip(frames, pictures):
        assert np.abs(frame.astype(int) - picture).mean() < 4


# ------------------------------------------------------------------------------------------- from the shell


def play(folder: Path, script: str, flags: str) -> str:
    """Standard output of a script that must succeed."""
    result = run(folder, flags, script)
    assert result.returncode == 0, result.stderr
    return result.stdout


# epsilon does not depend on the length of the run: one that is resumed can be compared with one that is not
FLAGS = "--device cpu --env-id Breakout --num-envs 2 --learning-starts 60 --buffer-size 500 --start-e 0.1 --end-e 0.1"
FLAGS += " --batch-size 8 --target-network-frequency 30 --max-episode-frames 200"
FLAGS += " --eval-episodes 1 --eval-frequency 0 --no-capture-video --wandb-mode disabled"


@pytest.fixture(scope="module")
def dqn_run(tmp_path_factory) -> Path:
    """The folder of a run of dqn_atari.py, 120 steps."""
    folder = tmp_path_factory.mktemp("dqn")
    play(folder, "dqn_atari.py", FLAGS + " --total-timesteps 120")
    return run_folder(folder)


@pytest.mark.slow
def test_models_and_checkpoints_of_dqn_play_here(dqn_run, tmp_path):
    """The same returns with the same seed; the flags that dqn_atari.py does not have take their defaults."""
    flags = " --eval-episodes 3 --eval-epsilon 0.5 --max-episode-frames 108000"  # returns and lengths differ
    special = " --capture-video --video-length 10 --panels game history --saliency gradient --wandb-mode offline"
    results = [
        play(tmp_path, "dqn_atari.py", f"--evaluate {dqn_run}/model.pt --wandb-mode disabled" + flags),
        play(tmp_path, "dqn_atari_visual.py", f"--evaluate {dqn_run}/model.pt --wandb-mode disabled" + flags),
        play(tmp_path, "dqn_atari_visual.py", f"--evaluate {dqn_run}/checkpoint.pt" + flags + special),
    ]
    returns = [re.findall("step 120: return .*", result) for result in results]
    assert len(returns[0]) == 1 and returns[0] == returns[1] == returns[2]
    (video,) = tmp_path.glob("runs/*/videos/*.mp4")
    meta, frames = read_video(video)
    assert (meta["size"], len(frames)) == ((1280, 720), 10)
    check_wandb_record(tmp_path)


def check_wandb_record(folder: Path) -> None:
    """What is logged beside what dqn_atari.py logs."""
    records = wandb_records(folder)
    items = {key: value for r in records if r["type"] == "history" for key, value in r["history"]["item"].items()}
    assert {"eval/episodic_return", "eval/episodic_return_std", "eval/repeated_rewards"} <= set(items)
    assert items["eval/actions._type"] == items["eval/q_values._type"] == "histogram"
    counts, steps = items["eval/actions.values"], round(3 * items["eval/episodic_length"])
    assert items["eval/actions.bins"] == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert min(counts) > 0.05 * sum(counts)  # half of the actions are random
    assert 0 < steps - sum(counts) <= 15  # the steps that pressed FIRE to start a life were not chosen
    assert sum(items["eval/q_values.values"]) == 4 * sum(counts)
    assert (items["images/saliency.width"], items["images/saliency.height"]) == (480, 720)
    assert (items["images/eval.width"], items["videos/eval._type"]) == (1280, "video-file")
    config = [r["run"]["config"]["update"] for r in records if r["type"] == "run"][0]
    assert (config["panels"], config["saliency"]) == (["game", "history"], "gradient")
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/eval/*.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["return", "length", "repeated_rewards", "video"]
    assert sum(row[1] for row in table["data"]) == steps
    assert [row[3] is None for row in table["data"]] == [False, True, True]
    (artifact,) = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "run_table"]
    paths = [Path(entry["path"]) for entry in artifact["manifest"]["contents"]]
    assert {path.suffix for path in paths} == {".json", ".mp4"}


@pytest.mark.slow
def test_run_of_dqn_goes_on_here_bit_identical(dqn_run, tmp_path):
    """120 steps there and 80 here, with evaluations, videos and saliency between them: the network of 200 there."""
    play(tmp_path, "dqn_atari.py", FLAGS + " --total-timesteps 200")
    flags = f"--resume {dqn_run} --total-timesteps 200 --eval-frequency 40 --capture-video --video-length 2"
    play(tmp_path, "dqn_atari_visual.py", flags)
    assert len(list((dqn_run / "videos").glob("*.mp4"))) == 2
    folders = dqn_run, run_folder(tmp_path)
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in folders)
    assert ours["global_step"] == theirs["global_step"] == 200
    for key, value in theirs["agent"]["q_network"].items():
        assert torch.equal(value, ours["agent"]["q_network"][key])


def test_unknown_panel_ends_with_one_sentence():
    with pytest.raises(SystemExit) as error:
        check_args(Args(panels=("game", "surprize")))
    assert error.value.code == (
        "error: --panels surprize is no panel: there are game, q_values, frames, history, surprise, facts"
    )
