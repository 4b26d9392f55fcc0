"""Lists of public corpora in the form in which they are published, each of a few clips."""

import json

AUDIOSET = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=2, num_segs=2, num_unique_labels=3, num_positive_labels=3\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
    '-_a_b_c_d_e, 0.000, 10.000, "/m/09x0r"\n'
)
LISTS = {
    "VGGSound csv": ('---g-f_I2yQ,1,people marching,test\n-_a_b_c_d_e,130,"heart sounds, heartbeat",train\n'),
    "VGGSound test csv": ('---g-f_I2yQ_000001.mp4,people marching\n-_a_b_c_d_e_000130.mp4,"heart sounds, heartbeat"\n'),
    "MMAudio tsv": ("id\tlabel\n---g-f_I2yQ_000001\tpeople marching\n-_a_b_c_d_e_000130\theart sounds, heartbeat\n"),
    "AudioCaps csv": (
        "audiocap_id,youtube_id,start_time,caption\n"
        '97151,-_a_b_c_d_e,30,"A man talks, then laughs"\n'
        "97152,-_a_b_c_d_e,30,Someone speaks\n"
    ),
    "av-benchmark csv": "name,caption\n---g-f_I2yQ_000001,people marching\n",
    "AudioSet csv": AUDIOSET,
    "list of ids": "---g-f_I2yQ_000001\n\n-_a_b_c_d_e_000130.mp4\n",
    "VGG-SS json": json.dumps(
        [
            {"file": "---g-f_I2yQ_000001", "class": "people marching", "bbox": [[0, 0, 1, 1]]},
            {"file": "-_a_b_c_d_e_000130", "bbox": []},
        ]
    ),
}
"""By the name of the format."""
