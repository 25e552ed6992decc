"""The status page of the server: one HTML file without anything from elsewhere, which polls `/metrics.json`."""

from earlyexit_kernels.page_style import COMMON
from earlyexit_kernels.page_style import PAGE as FRAME

#: The page may run its own script and ask its own server, and nothing else.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "Cache-Control": "no-store",
}

STYLE = (
    COMMON
    + """main { max-width: 46rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.75rem 0 .5rem; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
.about { color: var(--grey); font-size: .9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
dl div { background: var(--soft); border-radius: .4rem; padding: .6rem .8rem; }
dt { font-size: .85rem; color: var(--grey); }
dd { margin: 0; font-size: 1.4rem; font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); }
svg .grey { fill: var(--grey); }
.bar { fill: var(--blue); }
.mark { stroke: var(--orange); stroke-width: 2; }
polyline { fill: none; stroke-width: 2; }
#p50 { stroke: var(--blue); }
#p99 { stroke: var(--orange); stroke-dasharray: 5 3; }
#notice { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem .8rem; }
[hidden] { display: none; }
input, button { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--grid); padding: .4rem; }
"""
)

SCRIPT = """"use strict"
const part = name => document.getElementById(name)
const history = []
let key = "", before = null

function drawn(parent, name, values, text) {
  const one = document.createElementNS("http://www.w3.org/2000/svg", name)
  for (const [attribute, value] of Object.entries(values)) one.setAttribute(attribute, value)
  if (text !== undefined) one.textContent = text
  parent.append(one)
}

function exits(rows, calibrated) {
  const chart = part("exits"), sum = rows.reduce((a, b) => a + b, 0), high = 22
  chart.setAttribute("viewBox", `0 0 400 ${high * rows.length + 4}`)
  chart.replaceChildren()
  const widest = Math.max(0.01, ...rows.map(n => n / Math.max(sum, 1)), ...(calibrated || []))
  rows.forEach((n, layer) => {
    const share = sum ? n / sum : 0, y = layer * high + 4, width = share / widest * 240
    drawn(chart, "text", {x: 58, y: y + 13, "text-anchor": "end"}, `layer ${layer + 1}`)
    drawn(chart, "rect", {class: "bar", x: 64, y, width, height: 16})
    const words = `${(100 * share).toFixed(1)} %, ${n}`
    drawn(chart, "text", {class: "grey", x: 396, y: y + 13, "text-anchor": "end"}, words)
    if (calibrated) {
      const x = 64 + calibrated[layer] / widest * 240
      drawn(chart, "line", {class: "mark", x1: x, x2: x, y1: y - 2, y2: y + 18})
    }
  })
}

function latency() {
  const known = history.filter(one => one.p99 !== null)
  const highest = Math.max(1, ...known.map(one => one.p99))
  for (const name of ["p50", "p99"]) {
    const points = known.map((one, i) => `${44 + 351 * i / 119},${105 - 95 * one[name] / highest}`)
    part(name).setAttribute("points", points.join(" "))
  }
  part("highest").textContent = highest < 100 ? highest.toPrecision(2) : highest.toFixed(0)
}

function show(now) {
  const sent = Object.values(now.requests).reduce((a, b) => a + b, 0)
  const seconds = before ? now.uptime_seconds - before.uptime_seconds : 0
  const rate = seconds > 0 ? ((now.rows - before.rows) / seconds).toFixed(1) : "0"
  const ms = one => one === null ? "-" : one.toFixed(1)
  const layers = now.exit_rows.reduce((total, n, layer) => total + n * (layer + 1), 0)
  const tiles = {
    workers: `${now.ready} of ${now.workers}`, requests: sent, refused: sent - (now.requests["200"] || 0),
    rate, queue: now.queue_rows, median: ms(now.latency_ms.p50), slowest: ms(now.latency_ms.p99),
    mean: now.rows ? (layers / now.rows).toFixed(2) + " of " + now.exit_rows.length : "-",
  }
  for (const [name, text] of Object.entries(tiles)) part(name).textContent = text
  part("model").textContent = `${now.model}, ${now.criterion}`
  part("mark").hidden = now.calibrated_shares === null
  exits(now.exit_rows, now.calibrated_shares)
  history.push(now.latency_ms)
  if (history.length > 120) history.shift()
  latency()
  const warned = now.drifting ? "Recent inputs leave at other layers than in the calibration: check the answers." : ""
  notice(now.ready < now.workers ? "A worker is being started again." : warned)
  before = now
}

function notice(text) {
  part("notice").hidden = !text
  part("notice").textContent = text
}

async function poll() {
  try {
    const answer = await fetch("metrics.json", {headers: key ? {Authorization: `Bearer ${key}`} : {}})
    part("ask").hidden = answer.status !== 401
    if (answer.ok) show(await answer.json())
    else notice(answer.status === 401 ? "This server expects an API key." : `The server answers ${answer.status}.`)
  } catch (error) { notice("The server does not answer.") }
  setTimeout(poll, 1000)
}

part("ask").addEventListener("submit", event => {
  event.preventDefault()
  key = part("key").value
})
poll()
"""

TILES = {
    "workers": "workers ready",
    "requests": "requests",
    "refused": "refused",
    "rate": "inputs a second",
    "queue": "inputs waiting",
    "median": "median, ms",
    "slowest": "99 % below, ms",
    "mean": "mean exit layer",
}

BODY = f"""<h1>earlyexit server</h1>
<p id="model" class="about"></p>
<p id="notice" role="status" hidden></p>
<form id="ask" hidden><label>API key <input id="key" type="password" autocomplete="off"></label>
<button>use</button></form>
<dl>
{"".join(f'<div><dt>{text}</dt><dd id="{name}">-</dd></div>' for name, text in TILES.items())}
</dl>
<h2>Exit layers of all inputs since the start</h2>
<svg id="exits" viewBox="0 0 400 60" role="img" aria-label="share of inputs that left at each layer"></svg>
<p id="mark" class="about" hidden>Orange lines: shares in the calibration.</p>
<h2>Time of a request</h2>
<svg viewBox="0 0 400 120" role="img" aria-label="time of a request in the last two minutes">
<text x="40" y="16" text-anchor="end" id="highest">1</text><text x="40" y="109" text-anchor="end">0</text>
<polyline id="p50"></polyline><polyline id="p99"></polyline>
</svg>
<p class="about">Milliseconds in the server, of the last 1000 requests; each second since this page was opened, at
most two minutes. Solid: median, dashed: 99 % are below.</p>
<script>
{SCRIPT}</script>"""

PAGE = FRAME.substitute(title="earlyexit server", style=STYLE, body=BODY)
