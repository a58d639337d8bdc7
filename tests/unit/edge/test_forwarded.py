"""Who sends a request: its peer, or whom a trusted proxy names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_peers import get
from labkeeper.edge.forwarded import NetworkError, Sender, networks, sender_of
from labkeeper.edge.heads import BadHead

TRUSTED = networks(["10.0.0.0/8", "192.0.2.1", "2001:db8::/32"])
FOR, PROTO, FORWARDED = b"x-forwarded-for", b"x-forwarded-proto", b"forwarded"
PROXY = Sender("10.0.0.1", secure=False)
CLIENT = "198.51.100.7"


def sender(*headers, peer=PROXY, trusted=TRUSTED):
    return sender_of(peer, list(headers), trusted)


@pytest.mark.parametrize("peer", ["198.51.100.1", "localhost", "fe80::1%eth0", "11.0.0.1"])
def test_nobody_else_is_believed(peer):
    said = [(FOR, b"1.2.3.4"), (PROTO, b"https"), (FORWARDED, b"for=1.2.3.4;proto=https")]
    known = Sender(peer, secure=False)
    assert sender(*said, peer=known) is known
    assert sender((FOR, b"nonsense"), (PROTO, b"x"), peer=known) is known


def test_without_trusted_proxies_nobody_is():
    assert sender((FOR, b"1.2.3.4"), (PROTO, b"https"), trusted=()) is PROXY


@pytest.mark.parametrize(
    ("lists", "address"),
    [
        ([b"198.51.100.7"], CLIENT),
        # What was there before the first proxy may be of anyone's making.
        ([b"1.2.3.4, 198.51.100.7"], CLIENT),
        ([b"nonsense,, 198.51.100.7"], CLIENT),
        ([b"10.9.9.9, 198.51.100.7"], CLIENT),
        # Further proxies of ours are skipped, in one list or several.
        ([b"198.51.100.7, 10.0.0.2,192.0.2.1"], CLIENT),
        ([b"1.2.3.4, 198.51.100.7", b"10.0.0.2"], CLIENT),
        # All are ours: the request begins there.
        ([b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # Some add a port.
        ([b"198.51.100.7:4711"], CLIENT),
        ([b"[2001:db9::7]:4711"], "2001:db9::7"),
        ([b"2001:DB9::7, 2001:db8::1"], "2001:db9::7"),
        ([b"::ffff:198.51.100.7, ::ffff:10.0.0.2"], CLIENT),
        ([], "10.0.0.1"),
    ],
)
def test_client_is_the_last_address_that_is_not_trusted(lists, address):
    assert sender(*((FOR, value) for value in lists), (PROTO, b"http")).address == address


def test_proxy_may_connect_over_ipv6_sockets():
    peer = Sender("::ffff:10.0.0.1", secure=False)
    assert sender((FOR, b"198.51.100.7"), peer=peer).address == CLIENT


@pytest.mark.parametrize(
    "bad",
    [b"", b"unknown", b"198.51.100.7,", b"198.51.100.256", b"a.example.org", b"[1.2.3.4", b"/"],
)
def test_malformed_address_of_a_trusted_proxy_is_refused(bad):
    with pytest.raises(BadHead, match="X-Forwarded-For of the proxy"):
        sender((FOR, bad))


@pytest.mark.parametrize(
    ("values", "secure"),
    [
        ([b"https"], True),
        ([b"HTTPS"], True),
        ([b"wss"], True),
        ([b"http"], False),
        ([b"ws"], False),
    ],
)
def test_scheme_is_what_the_proxy_says(values, secure):
    for peer in (PROXY, Sender("10.0.0.1", secure=True)):
        assert sender(*((PROTO, value) for value in values), peer=peer).secure is secure


def test_scheme_is_that_of_the_connection_if_the_proxy_says_nothing():
    for secure in (False, True):
        peer = Sender("10.0.0.1", secure=secure)
        assert sender((FOR, b"198.51.100.7"), peer=peer) == Sender(CLIENT, secure)


@pytest.mark.parametrize("values", [[b""], [b"ftp"], [b"https, http"], [b"https", b"https"]])
def test_malformed_scheme_of_a_trusted_proxy_is_refused(values):
    with pytest.raises(BadHead, match="X-Forwarded-Proto of the proxy"):
        sender(*((PROTO, value) for value in values))


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([b"for=198.51.100.7;proto=https"], Sender(CLIENT, secure=True)),
        ([b'For="[2001:db9::7]:4711"; PROTO="https"; by=x'], Sender("2001:db9::7", secure=True)),
        # The scheme is that of the hop from the client; those behind it do not count.
        (
            [b"for=1.2.3.4;proto=http, for=198.51.100.7;proto=https", b"for=10.0.0.2;proto=http"],
            Sender(CLIENT, secure=True),
        ),
        ([b"for=198.51.100.7"], Sender(CLIENT, secure=False)),
        ([b"proto=https"], Sender("10.0.0.1", secure=True)),
        ([b"for=unknown;proto=https"], Sender("10.0.0.1", secure=True)),
        ([b"for=_hidden, for=10.0.0.2;proto=http"], Sender("10.0.0.2", secure=False)),
        ([b"nonsense, for=198.51.100.7"], Sender(CLIENT, secure=False)),
    ],
)
def test_forwarded_is_read_if_there_is_nothing_else(lists, expected):
    headers = [(FORWARDED, value) for value in lists]
    assert sender(*headers) == expected
    assert sender(*headers, (FOR, b"203.0.113.9")) == Sender("203.0.113.9", secure=False)


@pytest.mark.parametrize(
    "bad", [b"for", b"for=x", b'for="', b"for=1.2.3.4;proto=ftp", b"=;", b"for=a b"]
)
def test_malformed_forwarded_of_a_trusted_proxy_is_refused(bad):
    with pytest.raises(BadHead, match="of the proxy"):
        sender((FORWARDED, bad))


@given(st.lists(st.tuples(st.sampled_from([FOR, PROTO, FORWARDED]), st.binary(max_size=30))))
def test_anything_is_understood_or_refused(headers):
    try:
        found = sender(*headers)
    except BadHead:
        return
    assert isinstance(found, Sender)
    assert found.address


@pytest.mark.parametrize("bad", ["", "10.0.0.1/8", "x", "10.0.0"])
def test_networks_are_checked(bad):
    with pytest.raises(NetworkError):
        networks([bad])


# In a real edge


def test_edge_believes_a_trusted_proxy_and_tells_the_keeper_and_labs(edge, lab):
    said = b"X-Forwarded-For: 1.2.3.4, 198.51.100.7", b"X-Forwarded-Proto: https"
    edge.connect().ask(get(b"/", *said))
    edge.proxy.trusted = networks(["127.0.0.0/8"])
    client = edge.connect()
    client.ask(get(b"/", *said))
    client.ask(get(b"/servers/lab/", *said))
    told = [dict(head.headers) for head in (*edge.keeper.heads, *lab.heads)]
    assert [(one[FOR], one[PROTO]) for one in told] == [
        (b"127.0.0.1", b"http"),
        (b"198.51.100.7", b"https"),
        (b"198.51.100.7", b"https"),
    ]


def test_malformed_header_of_a_proxy_gets_400_and_says_why(edge):
    edge.proxy.trusted = networks(["127.0.0.1"])
    reply = edge.connect().ask(get(b"/", b"X-Forwarded-For: unknown"))
    assert reply.status == 400
    assert b"X-Forwarded-For of the proxy" in reply.body
    assert edge.requests == []


def test_clients_behind_one_connection_of_a_proxy_share_none_behind_the_edge(edge):
    """Else a mistake in framing could mix up their answers."""
    edge.proxy.trusted = networks(["127.0.0.1"])
    client = edge.connect()
    for address in (b"198.51.100.7", b"198.51.100.7", b"198.51.100.8"):
        assert client.ask(get(b"/", b"X-Forwarded-For: " + address)).status == 200
    assert [len(visit.requests) for visit in edge.keeper.visits] == [2, 1]


def test_proxy_that_has_tls_gets_no_policy_about_it(edge):
    """It is the proxy's to send: the edge does not know its other ports."""
    edge.proxy.trusted, edge.proxy.hsts = networks(["127.0.0.1"]), True
    reply = edge.connect().ask(get(b"/", b"X-Forwarded-Proto: https"))
    assert b"strict-transport-security" not in reply.headers
