"""A batch crosses processes as plain contiguous arrays, without a copy where the transport has out-of-band buffers."""

from __future__ import annotations

import copy
import mmap
import pickle
import subprocess
import sys
import tempfile

import numpy
import pytest
import torch

from rlhf_ray.trajectories.batch import PER_TOKEN, BatchError, TrajectoryBatch, scatter_tokens
from rlhf_ray.trajectories.packing import pack

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # pytest resets our filter


def make_batch(sequences: int = 50) -> TrajectoryBatch:
    torch.manual_seed(0)
    lengths = torch.randint(1, 40, (sequences,)).tolist()
    tokens = sum(lengths)
    log_probs = torch.randn(tokens)
    log_probs[::3] = float("nan")
    return TrajectoryBatch.from_sequences(
        [torch.randint(0, 1000, (length,)) for length in lengths],
        action_mask=[[False] + [True] * (length - 1) for length in lengths],
        weight_version=torch.arange(tokens, dtype=torch.int32),
        log_probs=log_probs,
        finish_reason=[0] * sequences,
        score=torch.randn(sequences),
        half=torch.randn(sequences).half(),
        flag=torch.ones(sequences, dtype=torch.bool),
    )


def same(left: TrajectoryBatch, right: TrajectoryBatch) -> bool:
    ours, theirs = left.to_arrays(), right.to_arrays()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes() for name in ours
    )


def through_buffers(batch: TrajectoryBatch) -> tuple[TrajectoryBatch, bytes, list[mmap.mmap]]:
    """What Ray does: metadata in band, arrays out of band in memory whose pages no reader can write (it would crash)."""
    buffers: list[pickle.PickleBuffer] = []
    metadata = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    shared = []
    for buffer in buffers:
        with tempfile.TemporaryFile() as file:
            file.write(buffer.raw())
            file.flush()
            shared.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return pickle.loads(metadata, buffers=shared), metadata, shared


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_batch_survives_any_pickle(protocol: int) -> None:
    batch = make_batch()
    assert same(batch, pickle.loads(pickle.dumps(batch, protocol=protocol)))
    assert same(batch, copy.deepcopy(batch))
    empty = TrajectoryBatch.from_sequences([])
    assert len(pickle.loads(pickle.dumps(empty, protocol=protocol))) == 0


def test_every_array_travels_out_of_band_and_none_is_copied_on_arrival() -> None:
    batch = make_batch()
    arrived, metadata, shared = through_buffers(batch)
    assert same(batch, arrived)
    assert len(shared) == len(batch.columns) + 1  # the offsets
    assert len(metadata) < 2_000
    addresses = {numpy.frombuffer(buffer, dtype=numpy.uint8).ctypes.data for buffer in shared}
    assert {arrived.offsets.data_ptr(), *(arrived[name].data_ptr() for name in arrived.columns)} == addresses


def test_nothing_is_copied_on_the_way_out() -> None:
    batch = make_batch()
    arrays = batch.to_arrays()
    assert arrays.pop("offsets").ctypes.data == batch.offsets.data_ptr()
    assert {name: array.ctypes.data for name, array in arrays.items()} == {
        name: batch[name].data_ptr() for name in batch.columns
    }
    assert all(array.flags.c_contiguous for array in arrays.values())


def test_a_slice_sends_only_its_own_tokens() -> None:
    batch = make_batch(1000)
    part = batch.select(range(10, 12))
    arrived, _, shared = through_buffers(part)
    assert same(part, arrived)
    per_token = sum(batch[name].element_size() for name in batch.columns if name in PER_TOKEN)
    per_sequence = sum(batch[name].element_size() for name in batch.columns if name not in PER_TOKEN)
    assert sum(map(len, shared)) == part.num_tokens * per_token + len(part) * per_sequence + (len(part) + 1) * 8
    assert len(pickle.dumps(part)) < sum(map(len, shared)) + 2_000


def test_read_only_batches_do_all_that_batches_do() -> None:
    batch = make_batch()
    arrived, _, _ = through_buffers(batch)
    order = list(range(len(batch)))[::-1]
    assert same(arrived.select(order), batch.select(order))
    assert same(arrived.select(range(3, 9)), batch.select(range(3, 9)))
    assert same(TrajectoryBatch.concatenate([arrived, arrived]), TrajectoryBatch.concatenate([batch, batch]))
    assert same(
        arrived.with_columns(values=arrived["log_probs"] + 1), batch.with_columns(values=batch["log_probs"] + 1)
    )
    assert same(through_buffers(arrived)[0], batch)
    assert torch.equal(pack(arrived, order).token_ids, pack(batch, order).token_ids)
    reversed_tokens = arrived.select(order)["token_ids"]
    assert torch.equal(scatter_tokens([(order, reversed_tokens)], arrived), batch["token_ids"])
    assert same(arrived, batch)


def test_strided_columns_travel_too() -> None:
    score = torch.arange(6.0)[::2]
    batch = TrajectoryBatch.from_sequences([[1], [2], [3]], score=score)
    arrived, _, _ = through_buffers(batch)
    assert arrived["score"].tolist() == [0.0, 2.0, 4.0]


def test_a_fresh_process_reads_a_batch_without_a_warning() -> None:
    """torch warns of read-only arrays once a process, so only a fresh one can show that it does not."""
    program = (
        "import pickle; from rlhf_ray.trajectories import TrajectoryBatch;"
        "batch = TrajectoryBatch.from_sequences([[1, 2]], score=[1.5]); buffers = [];"
        "metadata = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append);"
        "shared = [bytes(buffer.raw()) for buffer in buffers];"
        "print(pickle.loads(metadata, buffers=shared)['score'].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[1.5]"
    assert done.stderr == ""


def test_arrays_without_offsets_are_refused() -> None:
    with pytest.raises(BatchError, match="need 'offsets'; there is: 'token_ids'"):
        TrajectoryBatch.from_arrays({"token_ids": numpy.zeros(3, dtype=numpy.int64)})
    with pytest.raises(BatchError, match="column 'values' has shape"):
        TrajectoryBatch.from_arrays(
            {"offsets": numpy.array([0, 3]), "token_ids": numpy.zeros(3, dtype=numpy.int64), "values": numpy.zeros(2)}
        )
