"""How a training's metrics are written down, read back and drawn."""

import io
import json
import math
import types

import numpy as np
import pytest
from agent_parts import Counter, Recorder
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import LocalPool
from agents import metrics as module
from agents.meters import Meters
from agents.metrics import MetricsLogger, plot_metrics, read_metrics


class Clock:
    """Time that passes when it is told to; stands in for the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def agent_of(clock, **attributes):
    return types.SimpleNamespace(step=0, nb_updates=0, meters=Meters(clock.monotonic), **attributes)


def logger_for(agent, folder, **settings):
    logger = MetricsLogger(folder, **settings)
    logger.set_model(agent)
    return logger


def lines_of(folder):
    """Every line must be JSON as others read it, too: no NaN, no Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def step(logger, clock, seconds=0.0, updates=0, loss=1.0):
    """One step of a training, at the end of so many seconds."""
    clock.now += seconds
    agent = logger.model
    agent.step += 1
    agent.meters.acted(1, 0.001)
    agent.meters.stepped([0.004], [0.006], [2])
    if updates:
        agent.nb_updates += updates
        agent.meters.updated(updates, 0.01 * updates, ["loss", "mean_q"], [loss, math.nan])
    logger.on_step_end(agent.step - 1, {})


def end_episode(logger, total, length=5, slot=0):
    logs = {"episode_reward": total, "nb_episode_steps": length, "nb_steps": logger.model.step}
    logger.on_episode_end(0, dict(logs, slot=slot, farm="127.0.0.1:1"))


def scalars(folder, tag):
    """(step, value) of all event files in a folder, read by TensorBoard."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    assert accumulator.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    return [
        (event.step, np.frombuffer(event.tensor_proto.tensor_content, "<f4")[0].item())
        for event in accumulator.Tensors(tag)
    ]


def tags(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return set(accumulator.Tags()["tensors"])


# ---- the lines ----


def test_an_episode_is_a_line(tmp_path, clock):
    logger = logger_for(agent_of(clock), tmp_path / "new" / "run", tensorboard=False)
    logger.on_train_begin({})
    for _ in range(3):
        step(logger, clock, 0.5)
    end_episode(logger, np.float32(-2.5), np.int64(3), slot=np.int32(7))
    assert lines_of(tmp_path / "new" / "run") == [
        {
            "kind": "episode",
            "time_s": 1.5,
            "step": 3,
            "episode": 1,
            "return": -2.5,
            "length_steps": 3,
            "slot": 7,
            "farm": "127.0.0.1:1",
        }
    ], "it is in the file before anything is closed"
    logger.on_train_end({})


def test_an_interval_is_a_line_when_its_time_has_come(tmp_path, clock):
    logger = logger_for(agent_of(clock), tmp_path, interval_s=10.0, tensorboard=False)
    clock.now += 50.0  # built long before the training
    logger.on_train_begin({})
    for _ in range(4):
        step(logger, clock, 2.0)
    assert lines_of(tmp_path) == []
    step(logger, clock, 2.0, updates=10, loss=0.25)
    (line,) = lines_of(tmp_path)
    assert {name: line[name] for name in ("kind", "time_s", "step", "updates", "mean_return_10")} == {
        "kind": "interval",
        "time_s": 10.0,
        "step": 5,
        "updates": 10,
        "mean_return_10": None,
    }
    assert (line["interval_steps"], line["interval_updates"], line["interval_s"]) == (5, 10, 10.0)
    assert (line["steps_per_s"], line["updates_per_s"], line["updates_per_step"]) == (0.5, 1.0, 2.0)
    times = [line[name] for name in ("env_time_ms", "network_time_ms", "acting_time_ms", "learning_time_ms")]
    assert times == pytest.approx([4.0, 2.0, 1.0, 10.0])
    assert line["learning_share"] == pytest.approx(0.01)
    assert (line["policy_age_updates"], line["train/loss"]) == (2.0, 0.25)
    step(logger, clock, 9.0)
    assert len(lines_of(tmp_path)) == 1
    step(logger, clock, 1.0, updates=1)
    assert lines_of(tmp_path)[1]["updates"] == 11
    logger.on_train_end({})
    assert len(lines_of(tmp_path)) == 2, "nothing has come since the last one"


def test_the_end_of_a_training_writes_what_is_left(tmp_path, clock):
    logger = logger_for(agent_of(clock), tmp_path, tensorboard=False)
    logger.on_train_begin({})
    step(logger, clock, 2.0)
    logger.on_train_end({})
    (line,) = lines_of(tmp_path)
    assert (line["step"], line["interval_s"]) == (1, 2.0)


def test_the_mean_return_is_of_the_last_ten(tmp_path, clock):
    logger = logger_for(agent_of(clock), tmp_path, tensorboard=False)
    logger.on_train_begin({})
    for total in range(14):
        end_episode(logger, total)
    step(logger, clock, 10.0)
    assert lines_of(tmp_path)[-1]["mean_return_10"] == sum(range(4, 14)) / 10
    logger.on_train_end({})


def test_what_is_no_number_is_null(tmp_path, clock):
    logger = logger_for(agent_of(clock), tmp_path)
    logger.on_train_begin({})
    end_episode(logger, math.nan)
    end_episode(logger, np.float32(-math.inf))
    step(logger, clock, 10.0, updates=1, loss=math.inf)
    logger.on_train_end({})
    logger.close()
    first, second, interval = lines_of(tmp_path)
    assert (first["return"], second["return"]) == (None, None)
    assert (interval["mean_return_10"], interval["train/loss"]) == (None, None)
    assert "train/mean_q" not in interval
    assert {"episode/return", "train/loss"}.isdisjoint(tags(tmp_path))
    assert scalars(tmp_path, "episode/length_steps") == [(0, 5.0), (0, 5.0)]
    assert np.isnan(read_metrics(tmp_path)["interval/train/loss"]).all()


def test_an_agent_without_meters_has_its_lines_too(tmp_path, clock):
    agent = types.SimpleNamespace(step=3)
    logger = logger_for(agent, tmp_path)
    logger.on_train_begin({})
    clock.now += 10.0
    logger.on_step_end(0, {})
    logger.on_train_end({})
    logger.close()
    assert lines_of(tmp_path) == [
        {"kind": "interval", "time_s": 10.0, "step": 3, "updates": None, "mean_return_10": None}
    ]


# ---- going on ----


def test_a_training_that_goes_on_goes_on_in_the_same_file(tmp_path, clock):
    for begun in range(2):
        logger = logger_for(agent_of(clock), tmp_path, tensorboard=False)
        logger.model.step = 12 * begun
        for part in range(2):  # as two calls of fit
            logger.on_train_begin({})
            for total in range(6):
                step(logger, clock, 1.0)
                end_episode(logger, 100 * begun + 10 * part + total)
            logger.on_train_end({})
            clock.now += 1000.0  # nobody trains
    read = read_metrics(tmp_path)
    assert read["episode/episode"] == list(range(1, 25))
    assert read["episode/step"] == list(range(1, 25))
    assert read["episode/time_s"] == list(range(1, 25))
    assert read["interval/time_s"] == [6, 12, 18, 24]
    assert read["interval/interval_s"] == [6.0] * 4, "the time between two trainings is nobody's"
    assert read["interval/mean_return_10"][2] == (12 + 13 + 14 + 15 + sum(range(100, 106))) / 10


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b'{"kind": "episode", "time_s": 1.5, "ret', 1),
        (b'{"kind": "episode", "time_s": 1.5, "step": 4, "episode": 2, "return": 3.0}', 2),
        (b'{"farm": "\xc3', 1),
        (b"\x00" * 70_000, 1),
    ],
)
def test_half_a_line_of_a_killed_training_harms_no_other_line(tmp_path, clock, tail, kept):
    whole = b'{"kind": "episode", "time_s": 1.25, "step": 3, "episode": 1, "return": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + tail)
    logger = logger_for(agent_of(clock), tmp_path, tensorboard=False)
    logger.on_train_begin({})
    end_episode(logger, 7.0)
    logger.on_train_end({})
    lines = lines_of(tmp_path)
    assert len(lines) == kept + 1
    assert lines[0] == json.loads(whole)
    assert (lines[-1]["return"], lines[-1]["episode"]) == (7.0, kept + 1)


def test_a_full_disk_is_told_once_and_ends_no_training(tmp_path, clock, caplog, monkeypatch):
    class Full(io.StringIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    logger = logger_for(agent_of(clock), tmp_path, tensorboard=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "open", lambda path, *how, **more: path.touch() or Full(), raising=False)
        logger.on_train_begin({})
    end_episode(logger, 1.0)
    end_episode(logger, 2.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
    logger.on_train_end({})
    logger.on_train_begin({})
    end_episode(logger, 3.0)
    logger.on_train_end({})
    assert [line["return"] for line in lines_of(tmp_path)] == [3.0]


# ---- TensorBoard ----


def test_tensorboard_reads_the_same_numbers_over_the_agents_steps(tmp_path, clock):
    logger = logger_for(agent_of(clock), tmp_path)
    for _ in range(2):
        logger.on_train_begin({})
        for _ in range(3):
            step(logger, clock, 5.0, updates=2, loss=0.5)
        end_episode(logger, -3.5, 3)
        logger.on_train_end({})
    logger.close()
    assert scalars(tmp_path, "episode/return") == [(3, -3.5), (6, -3.5)]
    assert scalars(tmp_path, "episode/length_steps") == [(3, 3.0), (6, 3.0)]
    assert scalars(tmp_path, "train/loss") == [(2, 0.5), (3, 0.5), (5, 0.5), (6, 0.5)]
    assert scalars(tmp_path, "time/env_ms") == [(s, pytest.approx(4.0)) for s in (2, 3, 5, 6)]
    assert scalars(tmp_path, "speed/steps_per_s")[0] == (2, pytest.approx(0.2))
    assert tags(tmp_path) == {
        "episode/return",
        "episode/length_steps",
        "episode/mean_return_10",
        "speed/steps_per_s",
        "speed/updates_per_s",
        "speed/updates_per_step",
        "time/env_ms",
        "time/network_ms",
        "time/acting_ms",
        "time/learning_ms",
        "share/waiting",
        "share/learning",
        "share/throttled",
        "policy/age_updates",
        "train/loss",
    }
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1, "one file, however often fit is called"


def test_without_tensorboard_there_is_no_file_of_it(tmp_path, clock):
    logger = logger_for(agent_of(clock), tmp_path, tensorboard=False)
    logger.on_train_begin({})
    end_episode(logger, 1.0)
    logger.on_train_end({})
    logger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- reading and drawing ----


def test_columns_of_a_kind_are_of_one_length_and_broken_lines_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "episode", "step": 1, "return": 2.0}\n'
        '{"kind": "episode", "ste\n'
        "[1, 2]\n"
        '{"kind": "of another program"}\n'
        '{"step": 4}\n'
        '{"kind": "interval", "step": 2}\n'
        '{"kind": "interval", "step": 3, "train/loss": 0.5}\n'
    )
    read = read_metrics(tmp_path / "metrics.jsonl")
    assert read == {
        "episode/step": [1],
        "episode/return": [2.0],
        "interval/step": [2, 3],
        "interval/train/loss": [pytest.approx(math.nan, nan_ok=True), 0.5],
    }
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "nothing.jsonl")


def drawn(monkeypatch):
    """The figures that are saved from now on."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_a_picture_has_all_panels_with_their_units(tmp_path, clock, monkeypatch):
    logger = logger_for(agent_of(clock), tmp_path, tensorboard=False)
    logger.on_train_begin({})
    for total in range(30):
        step(logger, clock, 10.0, updates=total, loss=1.0 / (1 + total))
        end_episode(logger, float(total))
    logger.on_train_end({})
    figures = drawn(monkeypatch)
    file = plot_metrics(tmp_path, tmp_path / "pictures" / "it.png", "Pendulum, DDPG")
    assert imread(file).shape[0] > 500
    (figure,) = figures
    assert figure.get_suptitle() == "Pendulum, DDPG"
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels) == [
        "return of an episode",
        "loss",
        "metric of learning",
        "speed (1/s)",
        "time (ms)",
        "share of the time (%)",
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"agent steps"}

    def curves(name):
        return {line.get_label(): line for line in panels[name].get_lines()}

    mean = curves("return of an episode")["mean of the last 10"]
    assert mean.get_xdata().tolist() == list(range(1, 31))
    assert mean.get_ydata()[-1] == sum(range(20, 30)) / 10
    assert curves("loss")["loss"].get_ydata()[-1] == 1 / 30
    assert list(curves("speed (1/s)")) == ["steps/s", "updates/s"]
    assert list(curves("time (ms)")) == [
        "environment, a step",
        "network, a step",
        "acting, a step",
        "learning, an update",
    ]
    assert curves("share of the time (%)")["learner learns"].get_ydata()[-1] == pytest.approx(2.9)
    assert curves("time (ms)")["environment, a step"].get_ydata()[-1] == pytest.approx(4.0)


def test_a_training_that_has_just_begun_can_be_drawn(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("")
    figures = drawn(monkeypatch)
    assert plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "it.png", "nothing").exists()
    assert [axes.texts[0].get_text() for axes in figures[0].axes] == ["nothing yet"] * 6


# ---- with a real agent ----


def test_a_real_training_writes_its_episodes(tmp_path):
    logger = MetricsLogger(tmp_path, interval_s=0.0)
    pool = LocalPool([Counter(5, slot) for slot in range(3)])
    Recorder().fit(pool, nb_steps=45, callbacks=[logger], verbose=0)
    logger.close()
    read = read_metrics(tmp_path)
    assert read["episode/length_steps"] == [5] * 9
    assert sorted(read["episode/slot"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert set(read["episode/farm"]) == {"local"}
    assert read["episode/step"][-1] == read["interval/step"][-1] == 45
    assert read["episode/return"][0] == 1 + 2 + 3 + 4 + 5
    assert scalars(tmp_path, "episode/return")[0][1] == 15.0
