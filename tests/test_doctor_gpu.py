"""The checks of `msm-dist doctor` of GPUs, driver, NCCL and their variables, with and without such a machine."""

from types import SimpleNamespace

import pytest

from msm_dist.doctor import gpu as doctor_gpu


def fake_torch(version: tuple[int, ...] = (2, 27, 5), has_nccl: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        cuda=SimpleNamespace(nccl=SimpleNamespace(version=lambda: version)),
        distributed=SimpleNamespace(is_nccl_available=lambda: has_nccl),
    )


@pytest.fixture
def nccl_package(monkeypatch):
    """Sets what torch's metadata asks for."""
    return lambda *lines: monkeypatch.setattr(doctor_gpu.metadata, "requires", lambda name: list(lines))


PINNED = 'nvidia-nccl-cu12==2.27.5; platform_system == "Linux"'


def test_the_nccl_that_torch_was_built_with_is_ok(nccl_package) -> None:
    nccl_package("filelock", PINNED)
    (finding,) = doctor_gpu.check_nccl(fake_torch(), 8)
    assert (finding.status, finding.detail) == ("ok", "2.27.5")


def test_another_nccl_is_named_with_both_versions(nccl_package) -> None:
    nccl_package(PINNED)
    (finding,) = doctor_gpu.check_nccl(fake_torch((2, 18, 3)), 8)
    assert finding.status == "warn" and "2.18.3 is loaded, torch was built with 2.27.5" in finding.detail
    assert "LD_LIBRARY_PATH" in finding.remedy and "pip install nvidia-nccl-cu12==2.27.5" in finding.remedy


def test_where_torch_brings_its_own_nccl_no_more_is_claimed(nccl_package) -> None:
    nccl_package("filelock")
    (finding,) = doctor_gpu.check_nccl(fake_torch(), 8)
    assert finding.status == "ok" and "can't be found out" in finding.detail


@pytest.mark.parametrize(("count", "status"), [(1, "warn"), (2, "fail")])
def test_a_missing_nccl_fails_several_gpus_only(count: int, status: str) -> None:
    (finding,) = doctor_gpu.check_nccl(fake_torch(has_nccl=False), count)
    assert finding.status == status and "torch with NCCL" in finding.remedy


@pytest.mark.parametrize(
    ("cuda", "driver", "says"),
    [
        (None, "535.104.05", "a build without CUDA"),
        ("13.0", "535.104.05", "CUDA 13.0 needs driver 580.65.6 or newer"),
        ("12.8", "525.60.12", "CUDA 12.8 needs driver 525.60.13 or newer"),
        ("12.8", "535.104.05", "sees no GPU"),
    ],
)
def test_a_gpu_that_torch_does_not_see_has_its_reason(cuda: str | None, driver: str, says: str) -> None:
    finding = doctor_gpu._unseen("2.13.0", cuda, driver)
    assert finding.status == "warn" and finding.detail.endswith(says) and finding.remedy


@pytest.mark.parametrize(
    ("variable", "value", "hurts"),
    [
        ("NCCL_P2P_DISABLE", "1", True),
        ("NCCL_P2P_DISABLE", "0", False),
        ("NCCL_DEBUG", "info", True),
        ("NCCL_DEBUG", "WARN", False),
        ("CUDA_VISIBLE_DEVICES", "", True),
        ("CUDA_VISIBLE_DEVICES", "0,1", False),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", True),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3", False),
    ],
)
def test_variables_that_hurt_are_named_with_what_they_do(variable: str, value: str, hurts: bool) -> None:
    found = list(doctor_gpu.check_variables({variable: value}))
    assert bool(found) is hurts
    if hurts:
        assert found[0].status == "warn" and f"{variable}={value}: " in found[0].detail
        assert f"unset {variable}" in found[0].remedy


@pytest.mark.parametrize(
    ("variable", "value", "lacking"),
    [
        ("NCCL_SOCKET_IFNAME", "ib0", "ib0"),
        ("NCCL_SOCKET_IFNAME", "eth", ""),
        ("NCCL_SOCKET_IFNAME", "=eth", "eth"),
        ("NCCL_SOCKET_IFNAME", "^docker", ""),
        ("NCCL_SOCKET_IFNAME", "ib0,eth1", ""),
        ("GLOO_SOCKET_IFNAME", "eth1", ""),
        ("GLOO_SOCKET_IFNAME", "eth", "eth"),
        ("GLOO_SOCKET_IFNAME", "eth1,ib0", "ib0"),
    ],
)
def test_a_network_card_that_is_not_here_fails(monkeypatch, tmp_path, variable, value, lacking) -> None:
    for card in ("lo", "eth1"):
        (tmp_path / card).mkdir()
    monkeypatch.setattr(doctor_gpu, "NETWORK_CARDS", tmp_path)
    found = list(doctor_gpu.check_variables({variable: value}))
    assert [finding.status for finding in found] == (["fail"] if lacking else [])
    if lacking:
        assert f"called {lacking}:" in found[0].detail
        assert found[0].remedy == f"export {variable}=<one of eth1, lo>"


def test_a_drivers_version_is_read_from_nvidia_smi(monkeypatch, tmp_path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 535.104.05\necho 535.104.05\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert doctor_gpu.driver_version() == "535.104.05"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert doctor_gpu.driver_version() is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert doctor_gpu.driver_version() is None
