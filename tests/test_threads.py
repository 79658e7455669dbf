"""Threads that share a model, and threads that change it meanwhile."""

import threading

import pytest
import torch
import transformers
from tiny import INPUTS, RIGHT, pair

import fastbert
from fastbert.families import in_flight

pytestmark = pytest.mark.usefixtures("on_torch")
REAL = RIGHT.bool()


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def test_threads_share_a_model():
    _, ours = pair("BertModel")
    expected, results = ours(**INPUTS)[0], [None] * 8

    def work(i):
        with torch.inference_mode(), fastbert.backend("torch"):
            results[i] = ours(**INPUTS)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("began", ["as it is", "before it was accelerated"])
def test_a_change_waits_for_calls_in_flight_and_new_calls_wait_for_it(began):
    """By events, not by the clock: a hook holds a call inside the model.

    A call that began before comes to the new class's forward past its ``__call__``.
    """
    theirs, _ = pair("BertForSequenceClassification")
    expected = theirs(**INPUTS).logits
    handle = fastbert.accelerate(theirs)
    inside, go_on, undone = threading.Event(), threading.Event(), threading.Event()
    order, results = [], {}

    def hold(*args):
        if not inside.is_set():
            inside.set()
            assert go_on.wait(60)
            order.append("first call goes on")

    hook = theirs.classifier.register_forward_pre_hook(hold)

    def call(name):
        with torch.inference_mode(), fastbert.backend("torch"):
            call = theirs.forward if began.startswith("before") else theirs
            results[name] = call(**INPUTS).logits
        order.append(name)

    def undo():
        handle.undo()
        order.append("undone")
        undone.set()

    threads = [threading.Thread(target=call, args=("first",)), threading.Thread(target=undo)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    while not (in_flight._closed or undone.is_set()):  # until the change waits
        pass
    threads.append(threading.Thread(target=call, args=("second",)))
    threads[2].start()
    assert not undone.is_set() and type(theirs.bert) is fastbert.BertModel
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert order.index("first call goes on") < order.index("undone")
    assert type(theirs.bert) is transformers.BertModel
    for name in ("first", "second"):
        torch.testing.assert_close(results[name], expected)
    assert not in_flight._closed and not in_flight._calls
    hook.remove()
    handle = fastbert.accelerate(theirs)
    theirs.bert.register_forward_hook(lambda *args: handle.undo())
    with pytest.raises(RuntimeError, match="outside of a call"):
        theirs(**INPUTS)
    assert not in_flight._closed and not in_flight._calls


def test_accelerate_and_undo_in_a_loop_beside_calls():
    theirs, _ = pair("BertForMaskedLM")
    expected, failures, stop = theirs(**INPUTS).logits[REAL], [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                with torch.inference_mode(), fastbert.backend("torch"):
                    logits = theirs(**INPUTS).logits[REAL]
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        fastbert.accelerate(theirs).undo()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
