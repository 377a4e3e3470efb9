"""What every transport promises, as tests."""

from __future__ import annotations

from micro.testing._ends import EndCases
from micro.testing._faults import FaultCases
from micro.testing._limits import LimitCases
from micro.testing._secure import SecureCases
from micro.testing._streams import StreamCases
from micro.testing._survival import SurvivalCases
from micro.testing._unary import UnaryCases


class TransportSuite(
    UnaryCases, StreamCases, LimitCases, EndCases, FaultCases, SurvivalCases, SecureCases
):
    """The contract of ``Transport``: subclass it and name the ``backend``.

    ::

        class TestHTTPTransport(TransportSuite):
            backend = HTTPTransport
            multiplexed = False

    The transport listens at ``127.0.0.1:0``. Of a ``SocketTransport`` the tests also break the
    network; with nodes that die a client calls over it. The feature ``half_close`` is tested both
    ways: declared it has to hold, not declared a stream of the kind ``client`` has to be refused.
    The attributes ``window``, ``multiplexed`` and ``seed``, and the fixtures ``url`` and
    ``hasty_url`` may be set otherwise.
    """
