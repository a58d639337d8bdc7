"""Tokens, and the caller's identity."""

from __future__ import annotations

import time
from http import HTTPStatus

from labkeeper.api.handlers.common import Answer, caller, json_answer, origin, visible_owner
from labkeeper.api.services import Services
from labkeeper.api.views import me_model, new_token_model, session_model, token_model
from labkeeper.schema.answers.access import SessionList, TokenList
from labkeeper.schema.queries import SessionPath, SessionQuery, TokenPath, TokenQuery
from labkeeper.schema.requests.access import TokenRequest


def create_token(services: Services, body: TokenRequest) -> Answer:
    """Create a token. Only this answer contains it: it is stored as a hash."""
    tokens = services.tokens
    token, text = tokens.make(
        body.name,
        body.scope,
        body.limits,
        lifetime=body.expires_in,
        owner=caller().owner,
        origin=origin(),
    )
    return json_answer(new_token_model(token, text), HTTPStatus.CREATED)


def list_tokens(services: Services, query: TokenQuery) -> Answer:
    """List all tokens except the owner's, with what they allow."""
    now, tokens = time.time(), services.tokens.all(visible_owner(query.owner))
    return json_answer(TokenList(tokens=[token_model(token, now) for token in tokens]))


def revoke_token(services: Services, path: TokenPath) -> Answer:
    """Revoke a token immediately; its streams end, and the sessions that it has opened."""
    token = services.tokens.revoke(path.name, owner=caller().owner, origin=origin())
    services.sessions.revoke_made_by(token.caller.actor, token.owner)
    return json_answer(token_model(token, time.time()))


def list_sessions(services: Services, query: SessionQuery) -> Answer:
    """List the browser sessions at the public address, the oldest first."""
    found, unused_for = (
        services.sessions.all(visible_owner(query.owner)),
        services.sessions.unused_for,
    )
    sessions = [session_model(session, unused_for(session)) for session in found]
    return json_answer(SessionList(sessions=sessions))


def revoke_session(services: Services, path: SessionPath) -> Answer:
    """Revoke a browser's session immediately, with those that follow from it.

    Its connections to Labs are closed.
    """
    session = services.sessions.revoke(path.id, owner=caller().owner, origin=origin())
    return json_answer(session_model(session, services.sessions.unused_for(session)))


def get_me(_: Services) -> Answer:
    """Return who the caller is, and what they may do."""
    return json_answer(me_model(caller()))
