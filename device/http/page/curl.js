// A request as a command for a POSIX shell.

/** The command; with `hasKey` it reads the API key from the environment. */
export function curlCommand(url, request, hasKey) {
  const parts = [`curl --no-buffer ${quoted(url)}`, "-H 'Content-Type: application/json'"];
  if (hasKey) parts.push('-H "Authorization: Bearer $EDGEDRAFT_API_KEY"');
  parts.push(`-d ${quoted(JSON.stringify(request))}`);
  return parts.join(" \\\n  ");
}

function quoted(text) {
  return `'${String(text).replaceAll("'", "'\\''")}'`;
}
