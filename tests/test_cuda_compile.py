"""Compile every CUDA kernel for every default architecture, with no GPU, and read what ptxas says of it.

The build is the installation's own (csrc/recipes.py), kept below build/, so that a second run compiles nothing.
"""

import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path

import _compile_report
import pytest

pytestmark = pytest.mark.compile
CSRC = Path(__file__).resolve().parents[1] / "csrc"
FUNCTION = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill l.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


@functools.cache
def tools():
    """csrc/toolchain.py and csrc/recipes.py, which setup.py builds with."""
    sys.path.insert(0, str(CSRC))
    try:
        import recipes
        import toolchain
    finally:
        sys.path.remove(str(CSRC))
    return toolchain, recipes


@functools.cache
def build() -> dict:
    """Compile the CUDA library and return the record of it; skips, with the reason, where nvcc is missing."""
    if not CSRC.is_dir():
        pytest.skip("no source tree")
    toolchain, recipes = tools()
    try:
        toolchain.find_nvcc()
    except toolchain.Unmet as reason:
        pytest.skip(str(reason))
    info: dict = {"built": [], "kernels": {}}
    recipes.build_cuda(info, explicit=True)
    return info


def short_name(symbol: str) -> str:
    """The kernel's own name in a mangled symbol, where each name follows its length."""
    names, rest = [symbol], re.sub(r"^_ZN?", "", symbol)
    while digits := re.match(r"\d+", rest):  # one by one: a namespace without a name has a name full of digits
        end = digits.end() + int(digits[0])
        names.append(rest[digits.end() : end])
        rest = rest[end:]
    return names[-1]


@functools.cache
def report() -> list[dict]:
    """One row per kernel instantiation and architecture, as ptxas reported it."""
    build()
    rows = []
    for log in sorted((tools()[1].WORK / "cuda").glob("*_kernel.o.ptxas.txt")):
        if not list((CSRC / "cuda").glob(log.name.replace(".o.ptxas.txt", ".cu"))):
            continue  # of a kernel that is gone
        for function in FUNCTION.finditer(log.read_text()):
            shared = re.search(r"(\d+) bytes smem", function["rest"])
            spilled = sum(int(function[name]) for name in ("stack", "stores", "loads"))
            numbers = {"registers": int(function["registers"]), "spilled": spilled}
            numbers["shared"] = int(shared[1]) if shared else 0
            names = {"kernel": short_name(function["symbol"]), "symbol": function["symbol"]}
            names |= {"source": log.name, "arch": function["arch"].removeprefix("sm_")}
            rows.append(names | numbers | contents(instructions(names)))
    return rows


def instructions(row: dict) -> list[str]:
    return machine_code()[row["arch"].rstrip("af"), row["symbol"]]  # cuobjdump does not say sm_90a


def contents(names: list[str]) -> dict[str, int]:
    """What the instructions of a kernel tell: products of a warpgroup, bytes of the widest access to memory."""
    accesses = [name for name in names if name.startswith(("LDG", "STG"))]
    widths = [max((int(bits) for bits in re.findall(r"\.(64|128)\b", name)), default=32) // 8 for name in accesses]
    boxes = any(name.startswith("UTMA") for name in names)  # of 128 bytes a row
    return {"wgmma": any(name.startswith("HGMMA") for name in names), "widest": 128 if boxes else max(widths, default=0)}


def test_every_kernel_is_compiled_for_every_architecture(capsys) -> None:
    archs = build()["cuda_archs"]
    compiled = {(row["source"].removesuffix(".o.ptxas.txt"), row["arch"]) for row in report()}
    sources = [path.stem for path in (CSRC / "cuda").glob("*_kernel.cu")]
    expected = {(stem, arch) for stem in sources for arch in archs if not stem.startswith("sm90_") or arch == "90a"}
    assert compiled == expected
    _compile_report.publish("cuda", report(), capsys)


# Bytes spilled and reloaded that are let pass, by architecture and the end of the mangled symbol, and why.
SPILLS = {
    # One register of the path for single elements, for sizes that forbid vectors; the bound leaves room for one more block.
    ("80", "bn_add_act_kernelINS0_8BnTraitsI6__halfLi1ELb0EEELb0EEEvNS0_11BnActParamsE"): 16,
}


def test_no_kernel_spills() -> None:
    spilled = {(row["arch"], row["symbol"]): row["spilled"] for row in report() if row["spilled"]}
    assert len(spilled) == len(SPILLS)
    for (arch, symbol), spilled_bytes in spilled.items():
        assert [most for (a, end), most in SPILLS.items() if a == arch and symbol.endswith(end)] >= [spilled_bytes], symbol


def test_no_product_waits_for_another() -> None:
    """The compiler says so where it makes the products of a warpgroup run one by one."""
    build()
    logs = sorted((tools()[1].WORK / "cuda").glob("sm90_*_kernel.o.ptxas.txt"))
    assert logs and not [log.name for log in logs if "wgmma.mma_async instructions are serialized" in log.read_text()]


@functools.cache
def machine_code() -> dict[tuple[str, str], list[str]]:
    """Instructions, in order, of every kernel of the library, by architecture and symbol."""
    build()
    library = tools()[1].WORK / "cuda" / tools()[1].PRODUCTS["cuda"]
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton, which is not installed")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([cuobjdump, "-sass", library], capture_output=True, text=True, check=True).stdout
    found = {}
    for code in re.split(r"^\s*code for sm_", text, flags=re.M)[1:]:
        arch = code.partition("\n")[0].strip().rstrip("af")
        for function in code.split("Function : ")[1:]:
            symbol = function.split(maxsplit=1)[0]
            lines = re.finditer(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][\w.]*)", function, re.M)
            found[arch, symbol] = [line[1] for line in lines]
    return found


def test_hopper_kernels_are_made_of_hoppers_instructions() -> None:
    """Products of a warpgroup, tiles brought and taken by the TMA unit, registers handed over; accumulators never leave."""
    rows = [row for row in report() if row["kernel"] == "sm90_conv_act_kernel"]
    assert len(rows) == 4
    for row in rows:
        names = instructions(row)
        for wanted in ("HGMMA.64x128x16", "UTMALDG.3D", "UTMALDG.4D.IM2COL", "UTMASTG.3D", "USETMAXREG"):
            assert any(name.startswith(wanted) for name in names), (row["kernel"], wanted)
        assert not [name for name in names if name.startswith(("STL", "LDL", "HMMA"))]
        assert {name for name in names if name.startswith("STG")} == {"STG.E.64"}  # sums of blocks that share a tile
        products = [name for name in names if name.startswith(("HGMMA", "WARPGROUP.DEPBAR"))]
        assert len(products) <= 8 + 2  # a stage's products without a wait between them: none was serialised


def test_the_wide_convolution_is_made_of_hoppers_widest_products() -> None:
    """Copies to all blocks of a cluster; a tap's products without a wait between them; accumulators leave through transposed
    stores, 16 bytes at a time; beside them, in training, the statistics of a lane's two channels and a count, or the sums of
    its two channels."""
    rows = [row for row in report() if row["kernel"] == "sm90_conv_wide_kernel"]
    stored = []
    for row in rows:
        names = instructions(row)
        wanted = ["HGMMA.64x256x16", "UTMALDG.3D", "UTMALDG.4D.IM2COL.MULTICAST", "USETMAXREG", "UCGABAR", "STSM.16.MT88.4"]
        for start in wanted:
            assert any(name.startswith(start) for name in names), start
        assert not [name for name in names if name.startswith(("STL", "LDL", "HMMA"))]
        stores = [name for name in names if name.startswith("STG")]
        assert stores.count("STG.E.128") == 16
        stored.append((len(stores) - 16, any(name.startswith("LDSM.16.MT88.4") for name in names)))
        products = [name for name in names if name.startswith(("HGMMA", "WARPGROUP.DEPBAR"))]
        assert len(products) == 4 + 2
        # What blocks give back to each other waits for no memory: only the two barriers of the cluster do.
        assert names.count("MEMBAR.ALL.GPU") == names.count("UCGABAR_ARV") == 2
    assert len(rows) == 12 and {row["registers"] for row in rows} == {168} and not any(row["spilled"] for row in rows)
    # What is read beside the accumulators is turned round: residuals, and inputs of batch norms, but nothing for statistics.
    assert sorted(stored) == [(0, True)] * 4 + [(2, True)] * 4 + [(3, False)] * 4


def test_two_convolutions_in_one_launch_keep_what_is_between_them() -> None:
    """Residuals come and outputs go by the TMA unit alone; what is between is turned round into shared memory, and read as an
    operand; no product waits for another."""
    rows = [row for row in report() if row["kernel"] == "sm90_conv_act_conv_act_kernel"]
    assert len(rows) == 8
    shapes = set()
    for row in rows:
        names = instructions(row)
        for start in ("UTMALDG.3D", "UTMALDG.4D.IM2COL", "UTMASTG.4D.IM2COL", "USETMAXREG", "LDSM.16.MT88.4", "STSM.16.MT88.4"):
            assert any(name.startswith(start) for name in names), start
        assert not [name for name in names if name.startswith(("STL", "LDL", "HMMA", "STG"))]
        products = [re.match(r"HGMMA\.\w+", name)[0] for name in names if name.startswith("HGMMA")]
        waits = [name for name in names if name.startswith("WARPGROUP.DEPBAR")]
        assert len(waits) <= (10 if "HGMMA.64x32x16" in products else 5)  # for each loop and part, none for a product
        shapes |= set(products)
        last = ""  # of what is written for products and the TMA unit: published before the barrier that tells of it
        for name in names:
            last = name if name.startswith(("STSM", "FENCE.VIEW.ASYNC")) else last
            assert not (name.startswith("BAR.SYNC") and last.startswith("STSM")), row["symbol"]
    assert shapes == {"HGMMA.64x256x16", "HGMMA.64x128x16", "HGMMA.64x32x16"}


def test_few_channels_are_multiplied_by_tensor_cores() -> None:
    """Products of a warp, no local memory among them; x and weights copied past the registers."""
    kernels = ("conv_rows_kernel", "conv_rows_backward_kernel", "conv_rows_maxpool_kernel")
    rows = [row for row in report() if row["kernel"] in kernels]
    assert {row["arch"] for row in rows} == set(build()["cuda_archs"]) and len({row["symbol"] for row in rows}) == 24
    for row in rows:
        names = instructions(row)
        assert any(name.startswith("HMMA.16816.F32") for name in names) and any(name.startswith("LDGSTS") for name in names)
        assert not [name for name in names if name.startswith(("LDL", "STL"))], row["kernel"]
        assert any(name.startswith("LDSM") for name in names) == ("backward" in row["kernel"])
        if "maxpool" in row["kernel"]:
            assert {name for name in names if name.startswith("STG")} == {"STG.E.128"}
            assert any(name.startswith("SHFL") for name in names) and any("NAN" in name for name in names)


def test_clusters_hold_what_they_normalise() -> None:
    """Copies past the registers, all of the batches ahead and one more; two barriers of the cluster, 16 bytes at a time; on an
    older architecture nothing."""
    rows = [row for row in report() if row["kernel"] in ("bn_cluster_kernel", "bn_cluster_backward_kernel")]
    assert {row["arch"] for row in rows} == set(build()["cuda_archs"]) and len({row["symbol"] for row in rows}) == 6 + 9
    for row in rows:
        names = instructions(row)
        wanted = ("LDGSTS.E.BYPASS.128", "UCGABAR_ARV", "UCGABAR_WAIT")
        found = [sum(name.startswith(start) for name in names) for start in wanted]
        if int(row["arch"].rstrip("af")) < 90:
            assert found == [0, 0, 0]
            continue
        tensors = (2 if "backward" in row["kernel"] else 1) * (2 if "kernelIf" in row["symbol"] else 1)
        assert found == [28 * tensors, 2, 2], row
        assert row["widest"] == 16 and not [name for name in names if name.startswith(("LDL", "STL"))]


def test_vector_kernels_have_a_batch_of_16_byte_loads_in_flight() -> None:
    """Left free, the compiler puts each load right before its use; then latency, not bandwidth, is what is measured.

    Narrower loads among them, of the bytes beside a vector, do not end a batch; a store does.
    """
    code = machine_code()
    vector = {key: names for key, names in code.items() if re.search(r"_kernelI.*Li[48]E", key[1])}
    assert {arch for arch, _ in vector} == {arch.rstrip("af") for arch in build()["cuda_archs"]}
    for key, names in vector.items():
        memory = [name for name in names if name.startswith(("LDG", "STG"))]
        batches = [list(batch) for loads, batch in itertools.groupby(memory, lambda name: name.startswith("LDG")) if loads]
        assert max(sum(".128" in name for name in batch) for batch in batches) >= 4, key


def test_few_instantiations() -> None:
    for source in {row["source"] for row in report()}:
        symbols = {row["symbol"] for row in report() if row["source"] == source}
        variants = [symbol for symbol in symbols if "_kernelI" in symbol]
        assert len(variants) <= 24, f"{source}: {len(variants)} instantiations"


def test_the_library_needs_only_the_stable_abi() -> None:
    build()
    library = tools()[1].WORK / "cuda" / tools()[1].PRODUCTS["cuda"]
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = {name for name in re.findall(r"NEEDED.*\[(.+)\]", dynamic) if not name.startswith("ld-linux")}
    allowed = {"libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert "libtorch.so" in needed and needed <= allowed
    undefined = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\w+", undefined)
    assert "aoti_torch_get_current_cuda_stream" in undefined
