"""Three lines that ask a gateway for an answer: from a shell, from Python, and from a coding agent."""

from __future__ import annotations


def lines_to_paste(url: str, model: str, key: str | None = None) -> list[str]:
    """Return the lines for a shell. `url` is that of the gateway, without a path, and `model` one that chats."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    shown = f" -H 'Authorization: Bearer {key}'" if key else ""
    python = (
        f'import openai; print(openai.OpenAI(base_url="{url}/v1", api_key="{key or "none"}").chat.completions.create('
        f'model="{model}", messages=[{{"role": "user", "content": "Hello"}}]).choices[0].message.content)'
    )
    return [
        f"curl {url}/v1/chat/completions{shown} -d '{body}'",
        f"python3 -c '{python}'",
        f"ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key or 'none'} ANTHROPIC_MODEL={model} claude",
    ]


def line_to_embed(url: str, model: str, key: str | None = None) -> str:
    """Return the line for a shell, for a model that embeds."""
    shown = f" -H 'Authorization: Bearer {key}'" if key else ""
    return f'curl {url}/v1/embeddings{shown} -d \'{{"model": "{model}", "input": "Hello"}}\''
