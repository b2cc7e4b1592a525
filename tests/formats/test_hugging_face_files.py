"""plaingpt/formats/hugging_face_files.py: missing, damaged and hostile files are refused."""
import json
import os
import shutil
import sys

import pytest
from fine_tuning import save_gpt2
from foreign import save_theirs
from test_hugging_face import assert_refused

from plaingpt.formats.hugging_face import load_pretrained
from plaingpt.system.messages import UserError

INDEX = 'model.safetensors.index.json'


def test_a_name_of_nothing_is_refused():
    assert_refused('gtp2', 'hub ids have the form owner/name')


def test_without_a_network_a_hub_id_is_refused(monkeypatch, tmp_path):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    assert_refused('no-one/has-this', 'connect')


@pytest.mark.parametrize('package, source', [('safetensors', None), ('huggingface_hub', 'a/b')])
def test_a_missing_package_is_named_with_its_command(monkeypatch, tmp_path, package, source):
    save_gpt2(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f'needs the package {package}: pip install {package}'):
        load_pretrained(source or str(tmp_path))


@pytest.mark.parametrize('name, content, reason', [
    ('config.json', None, 'it has no config.json'),
    ('config.json', b'', 'config.json is damaged'),
    ('config.json', b'[' * 100_000, 'config.json is damaged'),
    ('config.json', b'\xff\xfe', 'config.json is damaged'),
    ('config.json', b'[]', 'config.json holds no JSON object'),
    ('config.json', b'{"model_type": "gpt2", "n_layer": ' + b'1' * 9999 + b'}', 'is damaged'),
    ('model.safetensors', None, 'it has no model.safetensors'),
    ('model.safetensors', b'', 'model.safetensors is damaged'),
    ('model.safetensors', b'x' * 100, 'model.safetensors is damaged'),
    ('model.safetensors', b'\x08' + bytes(7) + b'{"a": 1}', 'model.safetensors is damaged'),
])
def test_a_missing_or_damaged_file_is_refused(tmp_path, name, content, reason):
    save_gpt2(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path, reason)


@pytest.mark.parametrize('kept', [-9, 99, 0.5])
def test_weights_that_are_cut_short_are_refused(tmp_path, kept):
    save_theirs(tmp_path, 'Llama')
    weights = tmp_path / 'model.safetensors'
    content = weights.read_bytes()
    if kept == 0.5:
        kept = len(content) // 2
    weights.write_bytes(content[:kept])
    assert_refused(tmp_path, 'model.safetensors is damaged')


def test_a_pickle_is_refused_and_the_remedy_named(tmp_path):
    save_gpt2(tmp_path)
    (tmp_path / 'model.safetensors').rename(tmp_path / 'pytorch_model.bin')
    assert_refused(tmp_path, 'its weights are a pickle, which could run any code: save them as '
                             'safetensors')


def test_a_pipe_is_no_file(tmp_path, ends_in_time):
    save_gpt2(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    os.mkfifo(tmp_path / 'model.safetensors')
    assert_refused(tmp_path, 'it has no model.safetensors')


# ---- shards ----

@pytest.fixture
def sharded(tmp_path):
    """The folder of a Llama in several safetensors files."""
    folder = tmp_path / 'llama'
    save_theirs(folder, 'Llama', max_shard_size='12KB')
    assert len(list(folder.glob('model-*.safetensors'))) > 2
    return folder


def change_index(folder, old, new):
    """Replaces the name of a file in the index of shards."""
    path = folder / INDEX
    index = json.loads(path.read_text(encoding='utf-8'))
    files = index['weight_map']
    index['weight_map'] = {name: new if file == old else file for name, file in files.items()}
    path.write_text(json.dumps(index), encoding='utf-8')


def first_shard(folder):
    return min(path.name for path in folder.glob('model-*.safetensors'))


def test_shards_make_the_same_model_as_one_file(sharded, tmp_path):
    save_theirs(tmp_path / 'whole', 'Llama')
    expected = load_pretrained(str(tmp_path / 'whole')).state_dict()
    for name, tensor in load_pretrained(str(sharded)).state_dict().items():
        assert tensor.equal(expected[name])


@pytest.mark.parametrize('index, reason', [
    (b'{', 'is damaged'),
    (b'[]', 'holds no JSON object'),
    (b'{}', 'has no weight_map'),
    (b'{"metadata": null, "weight_map": {}}', 'has no weight_map'),
    (b'{"metadata": {}, "weight_map": ["a"]}', 'has no weight_map'),
    (b'{"metadata": {}, "weight_map": {"a": 5}}', 'names 5, which is no file'),
    (b'{"metadata": {}, "weight_map": {"a": ["b"]}}', "names ['b'], which is no file"),
    (b'{"metadata": {}, "weight_map": {"a": "missing.safetensors"}}', 'is missing'),
])
def test_a_damaged_index_of_shards_is_refused(sharded, index, reason):
    (sharded / INDEX).write_bytes(index)
    assert_refused(sharded, reason)


def test_a_missing_shard_is_refused_by_its_name(sharded):
    name = first_shard(sharded)
    (sharded / name).unlink()
    assert_refused(sharded, f'{name}, which {INDEX} names, is missing')


def test_a_shard_that_is_cut_short_is_refused_by_its_name(sharded):
    name = first_shard(sharded)
    content = (sharded / name).read_bytes()
    (sharded / name).write_bytes(content[:-1])
    assert_refused(sharded, f'{name} is damaged')


def test_tensors_that_two_shards_hold_are_refused(sharded):
    name = first_shard(sharded)
    shutil.copy(sharded / name, sharded / 'again.safetensors')
    index = json.loads((sharded / INDEX).read_text(encoding='utf-8'))
    index['weight_map']['x'] = 'again.safetensors'
    (sharded / INDEX).write_text(json.dumps(index), encoding='utf-8')
    assert_refused(sharded, 'two of its files hold')


@pytest.mark.parametrize('trick', ['../elsewhere.safetensors', '{parent}/elsewhere.safetensors',
                                   '../llama/{shard}', './{shard}', '..\\elsewhere.safetensors',
                                   '..', '', 'a\0.safetensors', 'config.json'])
def test_an_index_can_not_name_files_outside_the_folder(sharded, trick):
    shard = first_shard(sharded)
    shutil.copy(sharded / shard, sharded.parent / 'elsewhere.safetensors')
    change_index(sharded, shard, trick.format(parent=sharded.parent, shard=shard))
    assert_refused(sharded, INDEX)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(sharded):
    shard = sharded / first_shard(sharded)
    elsewhere = sharded.parent / 'elsewhere.safetensors'
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    assert_refused(sharded, f'{shard.name} is a link to a file elsewhere')


def test_a_downloaded_models_links_into_its_blobs_are_followed(sharded):
    hub = sharded.parent / 'models--someone--llama'
    snapshot = hub / 'snapshots' / 'abc'
    snapshot.parent.mkdir(parents=True)
    sharded.rename(snapshot)
    (hub / 'blobs').mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = hub / 'blobs' / str(number)
        path.rename(blob)
        path.symlink_to(os.path.join('..', '..', 'blobs', blob.name))
    load_pretrained(str(snapshot))
