"""The icon sets of `vlcl data icons`: which, in which version, and on which side of the split.

A set is the npm package @iconify-json/NAME. A family is here once: of sets that are one another's styles (`bx` and
`bxs`), forks (`feather` and `lucide`) or older forms (`ic` and `material-symbols`), one. No sets of emoji, flags,
brands and spinners, none whose names are not words, and none under a licence that is not in `LICENCES`.

The sets of VAL and TEST were drawn by other hands than those of TRAIN. So three are missing in TRAIN: `lucide`, whose
icons `hugeicons` has redrawn one by one under the same names, and `feather` and `meteor-icons`, the nearest to `tabler`
of all that were looked at.
"""

from collections.abc import Mapping

LICENCES = {  # SPDX; all let people redistribute changed drawings, the CC ones with the author's name
    "Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0", "ISC", "MIT", "MPL-2.0",
    "OFL-1.1", "Unlicense",
}  # fmt: skip

TRAIN: Mapping[str, str] = {
    "akar-icons": "1.2.7", "ant-design": "1.2.9", "basil": "1.2.4", "bi": "1.2.7", "bx": "1.2.3", "bytesize": "1.2.2",
    "carbon": "1.2.29", "charm": "1.2.3", "ci": "1.2.2", "cil": "1.2.3", "circum": "1.2.2", "clarity": "1.2.4",
    "codicon": "1.2.74", "cuida": "1.2.5", "duo-icons": "1.2.2", "el": "1.2.2", "entypo": "1.2.1",
    "eos-icons": "1.2.4", "ep": "1.2.4", "eva": "1.2.3", "f7": "1.2.2", "fa7-solid": "1.2.5", "fe": "1.2.4",
    "flat-color-icons": "1.2.3", "flowbite": "1.2.7", "fluent": "1.2.60", "fluent-mdl2": "1.2.1", "fontisto": "1.2.1",
    "foundation": "1.2.1", "game-icons": "1.2.4", "garden": "1.2.6", "gg": "1.2.2", "gis": "1.2.5",
    "gravity-ui": "1.2.15", "grommet-icons": "1.2.4", "guidance": "1.2.2", "healthicons": "1.2.13",
    "heroicons": "1.2.3", "humbleicons": "1.2.20", "icon-park": "1.2.4", "iconamoon": "1.2.2", "iconoir": "1.2.11",
    "icons8": "1.2.1", "ion": "1.2.7", "ix": "1.2.12", "jam": "1.2.3", "la": "1.2.1", "lets-icons": "1.2.2",
    "lineicons": "1.2.6", "lsicon": "1.2.5", "mage": "1.2.4", "majesticons": "1.2.5", "maki": "1.2.5", "map": "1.2.2",
    "marketeq": "1.2.2", "material-symbols": "1.2.93", "mdi": "1.2.3", "memory": "1.2.2", "mi": "1.2.2",
    "mingcute": "1.2.8", "mynaui": "1.2.19", "nimbus": "1.2.1", "octicon": "1.2.36", "oi": "1.2.0", "ooui": "1.2.24",
    "oui": "1.2.6", "pajamas": "1.2.15", "pepicons-pop": "1.2.4", "ph": "1.2.2", "pixel": "1.2.2",
    "pixelarticons": "1.2.9", "prime": "1.2.5", "proicons": "1.2.20", "qlementine-icons": "1.2.16", "quill": "1.2.4",
    "radix-icons": "1.2.6", "raphael": "1.2.1", "ri": "1.2.10", "rivet-icons": "1.2.2", "si": "1.2.17",
    "simple-line-icons": "1.2.1", "solar": "1.2.13", "stash": "1.2.4", "streamline": "1.2.5",
    "streamline-cyber": "1.2.2", "streamline-flex": "1.2.3", "streamline-freehand-color": "1.2.2",
    "streamline-plump": "1.2.0", "streamline-sharp": "1.2.0", "streamline-ultimate": "1.2.2",
    "streamline-ultimate-color": "1.2.2", "subway": "1.2.0", "system-uicons": "1.2.4", "tdesign": "1.2.19",
    "teenyicons": "1.2.2", "temaki": "1.2.6", "typcn": "1.2.2", "uil": "1.2.3", "uiw": "1.2.4", "vaadin": "1.2.1",
    "weui": "1.2.4", "wi": "1.2.1", "wpf": "1.2.0", "zondicons": "1.2.2",
}  # fmt: skip
VAL: Mapping[str, str] = {"hugeicons": "1.2.35"}
TEST: Mapping[str, str] = {"tabler": "1.2.41"}
SPLITS = {"train": TRAIN, "val": VAL, "test": TEST}
