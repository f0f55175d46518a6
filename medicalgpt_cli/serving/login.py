"""The login page: plain HTML, no script."""

from __future__ import annotations

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>medgpt</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 22rem; margin: 15vh auto; padding: 0 1rem; }}
label, input, button {{ display: block; width: 100%; box-sizing: border-box; font: inherit; }}
input, button {{ padding: .5rem; margin: .25rem 0 1rem; }}
p[role=alert] {{ border-left: .25rem solid #c33; padding-left: .75rem; }}
</style></head><body><h1>medgpt</h1>{word}
<form method="post" action="/login">
<label for="name">Name · 用户名</label><input id="name" name="name" autocomplete="username" required autofocus>
<label for="secret">Secret · 密码</label>
<input id="secret" name="secret" type="password" autocomplete="current-password" required>
<button>Log in · 登录</button></form></body></html>
"""


def page(*, wrong: bool = False, locked: bool = False) -> str:
    word = "This name and secret do not belong together. 用户名或密码不正确。" if wrong else ""
    word = "Too many attempts: wait a while. 尝试次数过多，请稍后再试。" if locked else word
    return _PAGE.format(word=f'<p role="alert">{word}</p>' if word else "")
