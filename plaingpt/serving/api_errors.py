"""
Errors as OpenAI's API words them, so that its clients raise their own exceptions for them:

    {"error": {"message": "...", "type": "...", "param": "n", "code": null}}
"""

BAD_REQUEST = 'invalid_request_error'
SERVER_ERROR = 'server_error'


class ApiError(Exception):
    """What a client gets instead of an answer.

    status: of HTTP. message: a sentence that says what is wrong and what to do.
    type: OpenAI's word for the kind. param: the parameter that is wrong, or None.
    code: a word for programs, or None. headers: further headers of the answer."""

    def __init__(self, status, message, type=BAD_REQUEST, param=None, code=None, headers=None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def content(self):
        """The body of the answer, a dict for JSON."""
        return {'error': {'message': self.message, 'type': self.type, 'param': self.param,
                          'code': self.code}}


def invalid(message, param=None, code=None):
    """The ApiError for a request that is wrong (400)."""
    return ApiError(400, message, param=param, code=code)


def no_model(name, served):
    """The ApiError for a model that is not here (404)."""
    return ApiError(404, f'The model {name[:100]!r} does not exist here: this server has '
                         f'{served!r}.', param='model', code='model_not_found')


def queue_full(reason):
    """The ApiError while as many requests wait as may wait (429). reason: a sentence's rest."""
    return ApiError(429, f'The server is busy ({reason}): try again in a second.',
                    type='rate_limit_error', code='queue_full', headers={'Retry-After': '1'})


def overloaded():
    """The ApiError while the server works on as many requests as it can (503)."""
    return ApiError(503, 'The server has too many requests at a time: try again in a second.',
                    type=SERVER_ERROR, code='overloaded', headers={'Retry-After': '1'})


def shutting_down():
    """The ApiError of a server that is about to end (503)."""
    return ApiError(503, 'The server is shutting down: ask again once it is back.',
                    type=SERVER_ERROR, code='shutting_down', headers={'Retry-After': '10'})


def timed_out():
    """The ApiError for a request whose time was over before its first token (503)."""
    return ApiError(503, 'The request has waited too long for its turn: try again later.',
                    type=SERVER_ERROR, code='timeout')


def internal():
    """The ApiError for a bug of ours (500), which tells nothing of it."""
    return ApiError(500, "The server had an error; its log has the details.", type=SERVER_ERROR)
