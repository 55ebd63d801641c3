"""What backward needs of the decoder layers, kept in page-locked host memory while it is not needed.

A layer's tensors are copied to the host on a stream of their own while the next layer computes, and back while backward
is at the next layer. So the device holds two layers' tensors at a time: of the layer that computes, and of the one
whose copies are under way. The last two layers' stay there, since backward begins with them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from qwen_dist.activations import LAYERS_ON_DEVICE, OFFLOAD_CHUNK_BYTES

# Smaller tensors stay: together they are some kilobytes a layer, and each copy costs microseconds.
SMALLEST_BYTES = 1 << 20


class Slot:
    """One storage of a layer: on the device, on the host, or both while it is on its way."""

    def __init__(self, tensor: torch.Tensor, layer: int) -> None:
        self.layer = layer
        self.on_device: torch.Tensor | None = tensor
        self.on_host: list[torch.Tensor] = []

    def flat(self) -> torch.Tensor:
        """All bytes of the storage on the device."""
        assert self.on_device is not None
        storage = self.on_device.untyped_storage()
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class View:
    """A tensor by the slot of its storage and its place in it."""

    def __init__(self, slot: Slot, tensor: torch.Tensor) -> None:
        self.slot, self.dtype = slot, tensor.dtype
        self.shape, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        self.source: torch.Tensor | None = tensor
        self.last_version = tensor._version

    @property
    def _version(self) -> int:
        """How often the tensor was changed in place while it was on the device, as `torch.Tensor._version`."""
        return self.last_version if self.source is None else self.source._version

    def leave_device(self) -> None:
        self.last_version, self.source = self._version, None


class HostStore:
    """Takes what autograd keeps of each layer; `offload_layers` puts it in place.

    Args:
        layers: the decoder layers in order.
        device: where they compute. On the CPU all is done but in the background (tests).
        smallest_bytes: smaller storages stay on the device.
    """

    def __init__(
        self, layers: list[torch.nn.Module], device: torch.device, smallest_bytes: int = SMALLEST_BYTES
    ) -> None:
        self.device, self.smallest_bytes = device, smallest_bytes
        self.parameters = [list(layer.parameters()) for layer in layers]
        self.num_offloaded = max(0, len(layers) - LAYERS_ON_DEVICE)
        self.is_async = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.is_async else None
        self.chunks: list[torch.Tensor] = []  # page-locked once, and used anew by each micro-batch
        self.used_bytes = 0
        self.slots: dict[int, dict[int, Slot]] = {}  # layer -> address of a storage -> its slot
        self.views: dict[int, list[View]] = {}  # layer -> the tensors that are on the device, too
        self.events: dict[tuple[str, int], Any] = {}  # ("sent" or "fetched", layer) -> its copies are done
        self.layer = -1  # that runs forward; -1: none
        self.shared: set[int] = set()

    @contextlib.contextmanager
    def keeping(self, layer: int, inputs: Any) -> Iterator[None]:
        """Within it, what autograd keeps is of `layer`.

        Args:
            layer: its number; 0 begins a new micro-batch.
            inputs: what all layers are given alike: it stays on the device.
        """
        if layer == 0:
            self.slots, self.views, self.events, self.used_bytes = {}, {}, {}, 0
        self._leave_device(layer - 2)
        self.layer, self.shared = layer, {_address(t) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self.layer = -1
        self._send(layer)

    def pack(self, tensor: torch.Tensor) -> Any:
        """What stands for a tensor that the layer keeps: a view of its slot, or itself where it stays."""
        layer = self.layer
        if not 0 <= layer < self.num_offloaded or tensor.device.type != self.device.type:
            return tensor
        address = _address(tensor)
        if tensor.untyped_storage().nbytes() < self.smallest_bytes or address in self.shared:
            return tensor
        for parameter in self.parameters[layer]:
            if _address(parameter) == address:
                # Under ZeRO-3 a gathered weight, which must be let go: its own values are there again in backward.
                is_whole = (parameter.shape, parameter.stride()) == (tensor.shape, tensor.stride())
                return parameter if is_whole else tensor
        slot = self.slots.setdefault(layer, {}).setdefault(address, Slot(tensor, layer))
        view = View(slot, tensor)
        self.views.setdefault(layer, []).append(view)
        return view

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor that `pack` was given, on the device."""
        if not isinstance(packed, View):
            return packed
        self.fetch(packed.slot.layer)
        self._wait("fetched", packed.slot.layer)
        whole = packed.slot.flat().view(packed.dtype)
        return whole.as_strided(packed.shape, packed.stride, packed.offset)

    def _send(self, layer: int) -> None:
        """Copy the layer's slots to the host."""
        with self._in_background("sent", layer):
            for slot in self.slots.get(layer, {}).values():
                flat = slot.flat()
                slot.on_host = self._host_pieces(flat.numel())
                start = 0
                for piece in slot.on_host:
                    piece.copy_(flat[start : start + piece.numel()], non_blocking=True)
                    start += piece.numel()

    def _leave_device(self, layer: int) -> None:
        """Let go of what is on the host by then."""
        self._wait("sent", layer)  # the main stream may use the memory again
        for slot in self.slots.get(layer, {}).values():
            slot.on_device = None
        for view in self.views.pop(layer, []):
            view.leave_device()

    def fetch(self, layer: int) -> None:
        """Begin to copy the layer's slots back, once; from then on backward alone holds them."""
        self._leave_device(layer)
        slots = [slot for slot in self.slots.pop(layer, {}).values() if slot.on_device is None]
        if not slots:
            return
        for slot in slots:  # allocated on the main stream, which frees them as well
            num_bytes = sum(piece.numel() for piece in slot.on_host)
            slot.on_device = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        with self._in_background("fetched", layer):
            for slot in slots:
                flat, start = slot.flat(), 0
                for piece in slot.on_host:
                    flat[start : start + piece.numel()].copy_(piece, non_blocking=True)
                    start += piece.numel()

    def _host_pieces(self, num_bytes: int) -> list[torch.Tensor]:
        """The next free bytes of the chunks, in order."""
        pieces = []
        while num_bytes:
            number, start = divmod(self.used_bytes, OFFLOAD_CHUNK_BYTES)
            if number == len(self.chunks):
                chunk = torch.empty(OFFLOAD_CHUNK_BYTES, dtype=torch.uint8, pin_memory=self.is_async)
                self.chunks.append(chunk)
            pieces.append(self.chunks[number][start : start + num_bytes])
            num_bytes -= pieces[-1].numel()
            self.used_bytes += pieces[-1].numel()
        return pieces

    @contextlib.contextmanager
    def _in_background(self, what: str, layer: int) -> Iterator[None]:
        """Run copies on the store's own stream, after all that the main stream has been given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
            event = torch.cuda.Event()
            event.record(self.stream)
        self.events[what, layer] = event

    def _wait(self, what: str, layer: int) -> None:
        """Let the main stream go on after those copies; once is enough."""
        event = self.events.pop((what, layer), None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def offload_layers(layers: list[torch.nn.Module], store: HostStore) -> None:
    """Let every layer's forward keep what backward needs in `store`."""
    for number, layer in enumerate(layers):
        layer.forward = functools.partial(_forward, layer.forward, store, number)


def _forward(plain: Callable[..., Any], store: HostStore, number: int, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(hidden, *args, **kwargs)
    with store.keeping(number, (args, kwargs)):
        output = plain(hidden, *args, **kwargs)
    if output.requires_grad:  # backward is at this layer when it has the gradient of its output
        output.register_hook(lambda grad: store.fetch(number - 1))
    return output


def _address(tensor: torch.Tensor) -> int:
    """The same of all tensors that share a storage, as long as it is there."""
    return int(tensor.untyped_storage()._cdata)
