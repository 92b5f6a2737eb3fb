"""Few-shot episodes: class folders on disk, episodes of disjoint classes, heads solved together, training in a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import torch_bilevel as tb
from experiments import episodes as few_shot
from experiments.__main__ import main
from experiments.config import ConfigError
from experiments.data import DataError
from experiments.episodes import Backbone, Classes, build, judge, load_folder_set, read_class_folders, sample
from experiments.meta_training import FirstOrderStepper, SecondOrderStepper, make_stepper, train


def write_folders(root: Path, classes: int, images: int, size: int = 10) -> None:
    image = pytest.importorskip("PIL.Image")
    for c in range(classes):
        folder = root / f"n{c:03d}"
        folder.mkdir(parents=True)
        for i in range(images):
            image.new("RGB", (size + i, size), (10 * c, i, 255)).save(folder / f"{i}.png")
        (folder / "notes.txt").write_text("not an image")


def toy_classes(count: int = 6, images: int = 24, size: int = 16, seed: int = 0) -> Classes:
    """Classes that differ in their mean image, in groups of one."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, 1, 1, size, size, generator=generator)
    return Classes(
        [m + 0.3 * torch.randn(images, 1, size, size, generator=generator) for m in means], list(range(count))
    )


def test_class_folders_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=3, images=2)
    (tmp_path / "empty").mkdir()
    classes = read_class_folders(tmp_path, 6)
    assert [tuple(c.shape) for c in classes] == [(2, 3, 6, 6)] * 3
    assert classes[2].dtype == torch.uint8
    assert (classes[2][1, :, 0, 0]).tolist() == [20, 1, 255]


@pytest.mark.parametrize(("name", "folder", "size"), [("mini_imagenet", "miniImageNet", 84), ("fc100", "FC100", 32)])
def test_published_sets_are_read_from_their_folders(name: str, folder: str, size: int, tmp_path: Path) -> None:
    for number, part in enumerate(few_shot.PARTS):
        write_folders(tmp_path / folder / part, classes=5 + number, images=2)
    parts = load_folder_set(name, tmp_path)
    assert [len(parts[part].images) for part in few_shot.PARTS] == [5, 6, 7]
    assert parts["val"].images[0].shape == (2, 3, size, size)
    assert float(parts["val"].images[0].max()) == 1.0
    assert parts["val"].groups == list(range(6))


def test_absent_sets_and_broken_images_say_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "FC100" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"'fc100' is not at hand: .*FC100/val, .*FC100/test missing.*60 class folders"):
        load_folder_set("fc100", tmp_path)
    with pytest.raises(DataError, match="folder of class folders"):
        read_class_folders(tmp_path / "FC100" / "train", 8)
    (tmp_path / "FC100" / "train" / "a").mkdir()
    (tmp_path / "FC100" / "train" / "a" / "x.png").write_bytes(b"no image")
    pytest.importorskip("PIL")
    with pytest.raises(DataError, match="x.png is not a readable image"):
        read_class_folders(tmp_path / "FC100" / "train", 8)
    with pytest.raises(ConfigError, match="omniglot.*mnist_fashion"):
        few_shot.load_classes("omniglot")


def test_mnist_fashion_parts_are_disjoint_and_rotated(data_dir: Path) -> None:
    parts = few_shot.load_mnist_fashion(data_dir, seed=3, per_class=21)
    assert [len(parts[part].images) for part in few_shot.PARTS] == [40, 20, 20]
    assert parts["test"].images[0].shape == (21, 1, 14, 14)
    assert torch.equal(torch.rot90(parts["test"].images[4], 1, (2, 3)), parts["test"].images[5])
    assert parts["test"].groups == [i for i in range(5) for _ in range(4)]
    firsts = [images[0] for part in parts.values() for images in part.images]
    assert len({tuple(image.flatten().tolist()) for image in firsts}) == 80
    again = few_shot.load_mnist_fashion(data_dir, seed=3, per_class=21)
    assert torch.equal(again["val"].images[7], parts["val"].images[7])


def test_episodes_hold_what_they_promise() -> None:
    marked = Classes([torch.full((9, 1, 2, 2), float(c)) + torch.arange(9.0)[:, None, None, None] / 100 for c in range(8)],
                     [c // 2 for c in range(8)])  # fmt: skip
    episodes = sample(marked, 6, torch.Generator().manual_seed(0), ways=3, shots=2, queries=7)
    assert episodes.support.shape == (6, 6, 1, 2, 2)
    assert episodes.query.shape == (6, 21, 1, 2, 2)
    for task in range(6):
        support, query = episodes.support[task, :, 0, 0, 0], episodes.query[task, :, 0, 0, 0]
        classes = [int(support[episodes.support_labels[task] == way][0]) for way in range(3)]
        assert len({c // 2 for c in classes}) == 3  # never two classes of a group
        for way, c in enumerate(classes):
            drawn = torch.cat(
                [support[episodes.support_labels[task] == way], query[episodes.query_labels[task] == way]]
            )
            assert sorted(torch.round(100 * (drawn - c)).int().tolist()) == list(range(9))  # each image once
    assert len({tuple(e.flatten().tolist()) for e in episodes.support}) > 1
    with pytest.raises(ConfigError, match="5-way.*there are 4"):
        sample(marked, 1, torch.Generator())
    with pytest.raises(ConfigError, match="need 10 images a class; one has 9"):
        sample(marked, 1, torch.Generator(), ways=3, shots=3, queries=7)


def test_heads_of_a_meta_batch_are_one_block_diagonal_problem() -> None:
    torch.manual_seed(0)
    backbone = Backbone(1, 16, width=4).double()
    episodes = sample(toy_classes(), 3, torch.Generator().manual_seed(1), queries=4)
    episodes = few_shot.Episodes(
        *(part.double() if part.is_floating_point() else part for part in vars(episodes).values())
    )
    heads = few_shot.Heads(3, backbone.features).double()
    problem = tb.BilevelProblem(
        heads, backbone, few_shot.head_loss(0.5), few_shot.query_loss, *few_shot.batches(episodes)
    )
    together = tb.ImplicitOracle(problem).evaluate()
    alone = []
    for t in range(3):
        one = few_shot.Episodes(*(part[t : t + 1] for part in vars(episodes).values()))
        head = few_shot.Heads(1, backbone.features).double()
        single = tb.BilevelProblem(head, backbone, few_shot.head_loss(0.5), few_shot.query_loss, *few_shot.batches(one))
        alone.append(tb.ImplicitOracle(single).evaluate())
    torch.testing.assert_close(together.gradient, sum(ev.gradient for ev in alone) / 3, rtol=1e-7, atol=1e-10)

    problem.write(y=together.lower.y)
    loss, accuracy = judge(backbone, episodes, steps=2000)
    logits = heads(backbone(episodes.query.flatten(0, 1)).unflatten(0, episodes.query.shape[:2]))
    assert loss == pytest.approx(cross_entropy(logits.flatten(0, 1), episodes.query_labels.flatten()).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(2) == episodes.query_labels).double().mean().item())


def test_steps_cost_what_they_should() -> None:
    torch.manual_seed(0)
    classes, generator = toy_classes(), torch.Generator().manual_seed(0)
    problem = build(Backbone(1, 16, width=4), sample(classes, 2, generator, queries=4))
    first = make_stepper("aid", {"lower_steps": 3, "lower_lr": 0.1, "adjoint_steps": 2, "lr": 0.1}, problem, 0)
    assert isinstance(first, FirstOrderStepper)
    for _ in range(2):
        before = first.counts.lower_gradients, first.counts.upper_gradients
        x = first.step(problem.at(*few_shot.batches(sample(classes, 2, generator, queries=4))))
        # one evaluation a meta-batch, at the point that the step leaves
        assert (first.counts.lower_gradients - before[0], first.counts.upper_gradients - before[1]) == (4, 1)
    assert not torch.equal(x, problem.x)
    second = make_stepper("ifsba", {"period": 1, "hessian_tol": 0.1, "lower_tol": 1e-3, "penalty": 1e2}, problem, 0)
    assert isinstance(second, SecondOrderStepper)
    second.step(problem)
    assert second.counts.hessians == 1
    with pytest.raises(ConfigError, match="not a method for fresh meta-batches"):
        make_stepper("lbfgs", {}, problem, 0)


def test_training_raises_accuracy_on_unseen_classes_and_repeats() -> None:
    classes = {"train": toy_classes(10, seed=0), "val": toy_classes(5, seed=1), "test": toy_classes(5, seed=2)}
    options = {"seconds": 60.0, "seed": 0, "meta_batch": 2, "width": 4, "judged": 5, "looks": 10**6, "shots": 1}
    run = train("adam", {"lr": 1e-2}, classes, max_steps=12, **options)
    assert (run["status"], run["records"][0]["step"], run["records"][-1]["step"]) == ("max_steps", 0, 12)
    assert run["records"][-1]["val"] < run["records"][0]["val"] - 0.01
    again = train("adam", {"lr": 1e-2}, classes, max_steps=12, **options)
    assert again["records"][-1]["test"] == run["records"][-1]["test"]
    spent = train("adam", {"lr": 1e-2}, classes, **{**options, "seconds": 0.2})
    assert spent["status"] == "budget"
    assert spent["records"][-1]["seconds"] < 1.0


def test_command_runs_on_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part in few_shot.PARTS:
        write_folders(tmp_path / "FC100" / part, classes=3, images=17)
    runs = str(tmp_path / "runs")
    arguments = ["few_shot", "--config", "configs/few_shot/fc100.yaml", "--data-dir", str(tmp_path), "--runs-dir", runs, "ways=3",
                 "shots=2", "meta_batch=1", "judged=2", "looks=1", "width=4", "seconds=0.3", "seeds=[0]",
                 "methods={adam: {lr: 0.01}}"]  # fmt: skip
    assert main(arguments) == 0
    assert "adam" in capsys.readouterr().out
    folder = next((tmp_path / "runs" / "few_shot").iterdir())
    assert (folder / "figures" / "few_shot.png").is_file()
    assert main([*arguments[:4], str(tmp_path / "nothing"), *arguments[5:]]) == 2
    assert "is not at hand" in capsys.readouterr().err
    assert main(["few_shot", "width=6"]) == 2
    assert "multiple of 4" in capsys.readouterr().err
