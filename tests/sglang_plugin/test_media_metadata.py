"""What sglang makes of the parts of a request is the same, whether they came through this connector or not."""

import subprocess
import sys
from pathlib import Path

from sglang_mm_conn.demo.launch import Launch

# In a process of its own: sglang reads its environment when it is imported.
CODE = """
import torch
from sglang.srt.disaggregation.encoder.receiver import EmbeddingData, MultiModalEmbeddingData
from sglang.srt.managers.schedule_batch import Modality
from sglang_mm_conn.connector.metadata import decode_metadata, encode_metadata
from sglang_mm_conn.sglang_plugin.encoder import metadata_of
from sglang_mm_conn.sglang_plugin.prompts import _embedding_data

LIMIT = 1 << 20

def part(index, modality, grid, rows, **more):
    return EmbeddingData(f"room_local_part_{index}", 4, index, torch.tensor(grid), modality, rows, **more)

PARTS = [
    part(0, Modality.IMAGE, [[1, 6, 8]], torch.ones(12, 6)),
    part(1, Modality.VIDEO, [[2, 6, 8], [3, 4, 4]], torch.ones(36, 6), second_per_grid_ts=torch.tensor([1.0, 0.5]),
         video_timestamps=[[0.1, 1.25], [0.0, 2.0, 3.9]]),
    part(2, Modality.VIDEO, [[1, 4, 4]], torch.ones(4, 6), second_per_grid_ts=torch.tensor([2.0]),
         video_timestamps=[[7.5]]),
    part(3, Modality.AUDIO, [70, 230], torch.ones(39, 2)),
]

def travel(one):
    data = encode_metadata(metadata_of(one), LIMIT)
    return _embedding_data("rid", one.embedding.clone(), decode_metadata(data, LIMIT))

def join(parts):
    whole = None
    for one in parts:
        one.req_id = "rid"
        if whole is None:
            whole = MultiModalEmbeddingData.from_embedding_data(one, model_type="qwen3_vl")
        else:
            whole.add(one)
    return whole

came = join([travel(one) for one in PARTS])
stayed = join(PARTS)
assert came.ready and came.modality_list == stayed.modality_list
assert came.embedding_shape_list == stayed.embedding_shape_list
one, two = came.get_mm_extra_meta(), stayed.get_mm_extra_meta()
assert one["video_timestamps"] == [[0.1, 1.25], [0.0, 2.0, 3.9], [7.5]]
assert [float(seconds) for seconds in one["second_per_grid_ts"]] == [1.0, 0.5, 2.0]
assert one["audio_feature_lens"].tolist() == [70, 230]
assert list(one) == list(two)
for key in one:
    assert type(one[key]) is type(two[key]) and repr(one[key]) == repr(two[key]), (key, one[key], two[key])
"""


def test_grids_time_stamps_and_lengths_are_what_sglang_would_have_kept() -> None:
    environment = Launch("encoder", Path(".")).environment()
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
