"""A copy of a script with another loss, optimizer, network or game: each is a change in one or two places."""

import pytest
import torch
from conftest import ROOT
from helpers import read_video, run, run_folder

pytestmark = pytest.mark.slow

FLAGS = "--device cpu --num-envs 2 --num-workers 0 --learning-starts 50 --buffer-size 200 --total-timesteps 100"
FLAGS += " --batch-size 8 --eval-episodes 1 --video-length 10 --max-episode-frames 200"

LOSS = {
    "loss = F.mse_loss(q_values, td_target)": "loss = F.smooth_l1_loss(q_values, td_target)",
    '"q_values": q_values})': '"q_values": q_values, "td_error": (td_target - q_values).abs()})',
}
OPTIMIZER = {
    "torch.optim.Adam(self.q_network.parameters(), args.learning_rate, **options)": "torch.optim.SGD("
    "self.q_network.parameters(), args.learning_rate, momentum=0.9)",
}
NETWORK = {
    """            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
""": """            nn.Linear(64 * 7 * 7, 512),
            nn.LayerNorm(512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
""",
}
CART_POLE = '''
class CartPole(gym.Wrapper):
    """CartPole seen as pictures: what another game must offer."""

    game, action_names, lives = "CartPole", ["LEFT", "RIGHT"], 0

    def __init__(self, args: Args):
        super().__init__(gym.make("CartPole-v1", max_episode_steps=args.max_episode_frames // FRAME_SKIP))
        self.stack = np.zeros((STACK, SIZE, SIZE), np.uint8)
        self.game_ended, self.recording = True, False
        self.episode_return, self.episode_length, self.repeated_rewards = 0.0, 0, 1.0

    @staticmethod
    def find_game(env_id: str) -> str:
        return "CartPole"

    def reset(self, *, seed=None, options=None):
        self.state, _ = self.env.reset(seed=seed)
        self.game_ended, self.episode_return, self.episode_length = False, 0.0, 0
        self.stack[:] = 0
        self.stack[-1] = self.screen()[:, :, 0]
        return self.stack, {}

    def step(self, action):
        self.state, reward, terminated, truncated, info = self.env.step(action)
        self.episode_return += reward
        self.episode_length += 1
        self.game_ended = terminated or truncated
        self.stack[:-1] = self.stack[1:]
        self.stack[-1] = self.screen()[:, :, 0]
        info["x"] = float(self.state[0])  # some environments tell something at every step
        if self.game_ended:
            info["episode"] = {"r": self.episode_return, "l": self.episode_length, "repeated_rewards": 1.0}
        return self.stack, reward, terminated, truncated, info

    def screen(self):
        picture = np.zeros((SIZE, SIZE, 3), np.uint8)
        x, angle = int(42 + 16 * self.state[0]), self.state[2]
        tip = (int(x + 50 * np.sin(angle)), int(70 - 50 * np.cos(angle)))
        cv2.line(picture, (x, 70), tip, (255, 255, 255), 2)
        return picture

    def state_dict(self):
        return {"state": self.state.tolist(), "return": self.episode_return, "length": self.episode_length}

    def load_state_dict(self, state):
        self.reset()
        self.state = self.unwrapped.state = np.array(state["state"])
        self.episode_return, self.episode_length = state["return"], state["length"]

'''
GAME = {"\nGame = Atari ": CART_POLE + "\nGame = CartPole "}


@pytest.mark.parametrize("changes", [LOSS, OPTIMIZER, NETWORK, GAME], ids=["loss", "optimizer", "network", "game"])
def test_change_in_a_copy_trains_and_records(tmp_path, changes):
    source = (ROOT / "dqn_atari.py").read_text()
    for old, changed in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, changed)
    assert len(changes) <= 2
    script = tmp_path / "my_idea.py"
    script.write_text(source)
    recorded = " --wandb-mode " + ("offline" if changes is LOSS else "disabled")  # which takes seconds
    result = run(tmp_path, FLAGS + recorded, script)
    assert result.returncode == 0, result.stderr
    folder = run_folder(tmp_path)
    _, pictures = read_video(next(folder.glob("videos/*.mp4")))
    assert len(pictures) == 10 or changes is GAME
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == 100 and (folder / "model.pt").exists()
    assert ("td_error" in checkpoint["agent"]["metrics"]) == (changes is LOSS)
    if changes is GAME:  # it can be saved and restored too
        flags = f"--resume {folder} --total-timesteps 150 --no-capture-video --wandb-mode disabled"
        resumed = run(tmp_path, flags, script)
        assert resumed.returncode == 0, resumed.stderr
