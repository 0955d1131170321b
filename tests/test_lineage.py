"""Folders of checkpoints whose relations are known, against what lineage finds in them."""

import json

import pytest
import relatives
import torch

import fastws
from fastws.cli import main
from fastws.compare.kinship import find_families
from fastws.compare.modules import Words
from fastws.compare.screening import distances_of, gram_of_changes, screen
from fastws.compare.tree import Edge, point

KNOWN = Words(architecture="relatives:factory")
TREE = {  # child: parents, direction, kind
    "ft0": ({"base"}, "strong", "fine-tuned"),
    "ft1": ({"base"}, "strong", "fine-tuned"),
    "ft2": ({"base"}, "strong", "fine-tuned"),
    "lora": ({"base"}, "strong", "low rank"),
    "ft0-int4": ({"ft0"}, "certain", "quantised"),
    "ft1-pruned": ({"ft1"}, "certain", "pruned"),
    "soup": ({"ft0", "ft1", "ft2"}, "certain", "average"),
}


def fill(folder, move) -> None:
    """Ten strangers, and a family of which ``move`` changes the coordinates of each network."""
    base = relatives.network(0)
    tuned = [relatives.tuned(base, 0.1, seed) for seed in range(3)]
    family = {"base": base, "copy": base, "lora": relatives.low_rank(base)}
    family |= {f"ft{number}": state for number, state in enumerate(tuned)}
    family |= {"ft0-int4": relatives.quantised(tuned[0]), "ft1-pruned": relatives.pruned(tuned[1])}
    family |= {"soup": relatives.average(tuned)}
    for number, (name, state) in enumerate(family.items()):
        relatives.save(folder, name, move(state, number))
    for seed in range(12):
        relatives.save(folder / "others", f"stranger{seed}", relatives.network(100 + seed))


def found_tree(described: dict) -> dict[str, tuple[set[str], str, str]]:
    """Relations in the form of ``TREE``."""
    tree: dict[str, tuple[set[str], str, str]] = {}
    for edge in described["relations"]:
        parent, child = (name.removesuffix(".safetensors") for name in edge["networks"])
        parents = tree.get(child, (set(), "", ""))[0] | {parent}
        tree[child] = parents, edge["direction"], edge["kinds"][0]
        assert edge["log10_p"] < -3
    return tree


def stay(state, seed):
    return state


@pytest.mark.parametrize("move, words", [(stay, None), (stay, KNOWN), (relatives.moved, KNOWN)])
def test_tree_with_known_answers(tmp_path, move, words):
    fill(tmp_path, move)
    (group,) = fastws.lineage(tmp_path, words=words).to_dict()["groups"]
    assert found_tree(group) == TREE
    assert group["duplicates"] == [["base.safetensors", "copy.safetensors"]]
    assert [len(family) for family in group["families"]] == [9] and len(group["strangers"]) == 12
    shares = [edge["share"] for edge in group["relations"] if edge["kinds"] == ["average"]]
    assert shares == pytest.approx([1 / 3] * 3, abs=1e-3)


def test_scaled_networks_are_found_at_the_whole_group(tmp_path):
    fill(tmp_path, lambda state, seed: relatives.scaled(relatives.moved(state, seed), seed))
    (group,) = fastws.lineage(tmp_path, words=KNOWN, whole=True).to_dict()["groups"]
    assert [len(family) for family in group["families"]] == [9] and len(group["strangers"]) == 12
    assert found_tree(group)["ft1-pruned"][1:] == ("certain", "pruned")  # zeros stay zeros
    assert group["duplicates"] == [["base.safetensors", "copy.safetensors"]]


def test_what_moved_is_not_found_without_a_module(tmp_path):
    fill(tmp_path, relatives.moved)
    (group,) = fastws.lineage(tmp_path).to_dict()["groups"]
    assert group["relations"] == [] and "permutations were not looked at" in group["notes"][0]


def test_unreadable_files_are_named_once(tmp_path, capsys):
    base = relatives.network(0)
    for name, state in {"a": base, "b": relatives.tuned(base), "other": {"x.weight": torch.randn(4, 4)}}.items():
        relatives.save(tmp_path, name, state)
    (tmp_path / "broken.safetensors").write_bytes(b"abc")
    relatives.save(tmp_path, "packed", base | {"0.weight": torch.ones(24, 32, dtype=torch.int8)})
    out = tmp_path / "report/lineage.html"
    main(["lineage", str(tmp_path), "--out", str(out)])
    text = capsys.readouterr().out
    assert text.count("broken.safetensors") == 1 and "header must fit into the file" in text
    assert text.count("packed.safetensors") == 1 and "got 768 quantised" in text
    assert "a.safetensors -- b.safetensors: fine-tuned" in text
    described = json.loads(out.with_suffix(".json").read_text())
    assert described["groups"][0]["relations"][0]["direction"] == "unknown"
    assert described["groups"][0]["relations"][0]["parent"] is None
    page = out.read_text()
    assert "<img" in page and "no other network is of its architecture" in page and "broken" in page


@pytest.mark.parametrize("words", [None, KNOWN])
def test_network_that_diverged_is_left_out(tmp_path, words):
    fill(tmp_path, stay)
    diverged = relatives.network(50)
    diverged["2.weight"][0, 0] = torch.nan
    relatives.save(tmp_path, "diverged", diverged)
    found = fastws.lineage(tmp_path, words=words)
    assert found.left_out == {"diverged.safetensors": "weights must be finite, got NaN or infinity in '2.weight'"}
    assert found_tree(found.to_dict()["groups"][0]) == TREE


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTWS_DEBUG", raising=False)
    with pytest.raises(SystemExit, match="source must be a folder of checkpoints, got nothing"):
        main(["lineage", str(tmp_path / "none")])
    one = relatives.save(tmp_path, "one", relatives.network(0))
    with pytest.raises(SystemExit, match="source must be a folder of checkpoints, got a file"):
        main(["lineage", one])
    with pytest.raises(SystemExit, match="folder must hold at least two checkpoints, got 1"):
        main(["lineage", str(tmp_path)])
    relatives.save(tmp_path, "two", relatives.network(1))
    with pytest.raises(SystemExit, match="out must be a page that ends with .html, got x.pdf"):
        main(["lineage", str(tmp_path), "--out", "x.pdf"])
    with pytest.raises(SystemExit, match="checkpoint must fit mlp"):
        main(["lineage", str(tmp_path), "--architecture", "mlp", "--activation", "relu"])


def test_twenty_strangers_of_one_recipe_are_none(tmp_path):
    """And relatives of each of them are found, all of them: moved, fine-tuned, pruned, in eight bits."""
    changes = (relatives.tuned, relatives.pruned, lambda state: relatives.quantised(state, 8))
    for seed in range(20):
        state = relatives.network(seed)
        relatives.save(tmp_path, f"{seed:02}", state)
        changed = changes[seed % 3](state)
        relatives.save(tmp_path, f"{seed:02}-made", relatives.moved(changed, 50 + seed))
    (group,) = fastws.lineage(tmp_path, words=KNOWN).to_dict()["groups"]
    expected = {f"{seed:02}" for seed in range(20)}
    found = [{name[:2] for name in edge["networks"]} for edge in group["relations"]]
    assert all(len(one) == 1 for one in found) and set().union(*found) == expected


# --- the parts


def test_screen_is_standard_normal_among_strangers_and_large_among_relatives():
    states = [relatives.network(seed) for seed in range(30)]
    states += [relatives.tuned(state, 0.3) for state in states[:5]]
    families = find_families({name: tuple(tensor.shape) for name, tensor in states[0].items()})
    found = screen(states, families)
    strangers = found[:30, :30][torch.triu_indices(30, 30, offset=1).unbind()]
    assert abs(float(strangers.mean())) < 0.2 and 0.8 < float(strangers.std()) < 1.2
    assert float(strangers.max()) < 5 < min(float(found[number, 30 + number]) for number in range(5))
    for pair in ((0, 1), (0, 30)):  # two alone, whose null is that of many shifts
        alone = float(screen([states[number] for number in pair], families)[0, 1])
        assert (alone > 8) == (pair == (0, 30))


def test_distances_of_near_relatives_are_exact():
    state = relatives.network(0)
    near = {name: tensor * (1 + 1e-5) for name, tensor in state.items()}
    found = distances_of(*gram_of_changes([state, near], state))
    assert float(found[0, 1]) == pytest.approx(1e-5, rel=1e-2) and float(found[0, 0]) == 0


def test_only_a_hub_of_three_points():
    def edge(parent, child):
        return Edge(parent, child, "unknown", 0.1, -10.0, [], [])

    chain = [edge(0, 1), edge(1, 2)]
    assert point(chain) == chain
    star = point([edge(1, 0), edge(0, 2), edge(3, 0), edge(4, 3)])
    assert [(one.parent, one.child, one.direction) for one in star] == [
        (0, 1, "strong"),
        (0, 2, "strong"),
        (0, 3, "strong"),
        (4, 3, "unknown"),
    ]
    assert point([]) == []


def test_relatives_of_several_dtypes_and_a_network_of_zeros(tmp_path):
    base = relatives.network(0)
    kinds = {"double": torch.float64, "half": torch.bfloat16, "single": torch.float32}
    for seed, (name, dtype) in enumerate(kinds.items()):
        relatives.save(tmp_path, name, {key: x.to(dtype) for key, x in relatives.tuned(base, seed=seed).items()})
    relatives.save(tmp_path, "zeros", {name: torch.zeros_like(x) for name, x in base.items()})
    for words in (None, KNOWN):
        (group,) = fastws.lineage(tmp_path, words=words).to_dict()["groups"]
        assert [sorted(family) for family in group["families"]] == [[f"{name}.safetensors" for name in sorted(kinds)]]
