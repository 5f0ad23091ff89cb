// Runs checks and prints a line of JSON for each. A check returns a text, or throws.
async function run(checks) {
  for (const [check, does] of Object.entries(checks)) {
    const [passed, said] = await does().then((said) => [true, said], (error) => [false, String(error?.stack ?? error)]);
    console.log(JSON.stringify({ check, passed, said: said.replaceAll("\n", " ").slice(0, 300) }));
  }
}

module.exports = { run, models: JSON.parse(process.env.MODELS) };
