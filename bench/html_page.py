"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment

from .report import ulp
from .suite import claims

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pysmooth benchmark</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1, h2 { line-height: 1.2 } img { max-width: 100% }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child, td.t { text-align: left } tr.ours td { background: #eaf6f0 }
small, .env { color: #666 }
</style></head><body>
<h1>pysmooth benchmark</h1>
<p class="env">{% for key, value in env.items() %}{{ key }}: {{ value }}{% if not loop.last %} &middot;
{% endif %}{% endfor %}</p>
{% for name, data in images %}<p><img alt="{{ name }}" src="data:image/png;base64,{{ data }}"></p>
{% endfor %}
{% if r.end_to_end %}<h2>Training</h2>
<table><tr><th>training</th><th>optimizer</th><th>steps/s</th><th>clip + step, ms</th><th>share</th></tr>
{% for e in r.end_to_end %}{% for side in ("torch", "pysmooth") %}
<tr{% if side == "pysmooth" %} class="ours"{% endif %}><td>{{ e.name }}</td><td>{{ side }}</td>
<td>{{ "%.1f"|format(e[side].steps_per_s) }}</td><td>{{ "%.3f"|format(e[side].optimizer_ms) }}</td>
<td>{{ "%.1f"|format(100 * e[side].optimizer_share) }} %</td></tr>{% endfor %}{% endfor %}</table>
{% for e in r.end_to_end %}<p>{{ e.name }} ({{ e.description }}): {{ e.verdict }} Largest difference of
the losses over {{ e.steps }} steps: {{ "%.1e"|format(e.max_loss_difference) }}.</p>{% endfor %}{% endif %}
{% if r.rows %}<h2>One step</h2>
<p>Medians of interleaved rounds; x is the rival's time over pysmooth's in the same rounds.
Rows that ran on the eager backend make no claim.</p>
<table><tr><th>model</th><th>method</th><th>contestant</th><th>ms</th><th>spread</th><th>x</th>
<th>roofline</th></tr>
{% for row in r.rows %}{% for c in row.contestants %}
<tr{% if c.name == "pysmooth" %} class="ours"{% endif %}><td>{{ row.model }}</td>
<td class="t">{{ row.method }}</td><td class="t">{{ c.name }}
{%- if c.name == "pysmooth" %} ({{ row.backend }}){% endif %}
{%- if c.compile_s is not none %} ({{ "%.0f"|format(c.compile_s) }} s to compile){% endif %}</td>
<td>{{ "%.3f"|format(c.median_ms) }}</td><td>{{ "%.3f"|format(c.iqr_ms) }}</td>
<td>{% if c.name != "pysmooth" %}{{ "%.2f"|format(c.ratio) if claims(row) else "no claim" }}{% endif %}
</td><td>{% if c.name == "pysmooth" and row.roofline_fraction is not none %}
{{- "%.2f"|format(row.roofline_fraction) }}{% endif %}</td></tr>{% endfor %}{% endfor %}</table>{% endif %}
{% if r.bandwidth %}<h2>Bandwidth, GB/s</h2><table>{% for k, v in r.bandwidth.items() %}
<tr><td>{{ k }}</td><td>{{ "%.1f"|format(v) }}</td></tr>{% endfor %}</table>{% endif %}
{% if r.host %}<h2>Host cost with fresh gradients</h2>
<table><tr><th>model</th><th>tensors</th><th>pysmooth, us per tensor</th><th>torch fused + clip</th></tr>
{% for h in r.host %}<tr><td>{{ h.model }}</td><td>{{ h.tensors }}</td>
<td>{{ "%.2f"|format(h.pysmooth_us_per_tensor) }}</td>
<td>{{ "%.2f"|format(h.torch_us_per_tensor) }}</td></tr>{% endfor %}</table>{% endif %}
{% if r.numerics %}<h2>Numerics against float64</h2>
<p>ULP: the largest error of one step from the same parameters and states, in units of the last place of
max(|old parameter|, |update|); none where something is kept in 16 bits. Distance: relative, from a float64
run on the same gradients; rounding may decide otherwise about signs and selections, in both alike.</p>
<table><tr><th>method</th><th>steps</th><th>ULP</th><th>rival's</th><th>distance</th><th>rival's</th>
<th>rival</th></tr>{% for n in r.numerics %}<tr><td>{{ n.method }}</td><td>{{ n.steps }}</td>
<td>{{ ulp(n.pysmooth_max_ulp) }}</td><td>{{ ulp(n.rival_max_ulp) }}</td>
<td>{{ "%.1e"|format(n.pysmooth_relative_error) }}</td>
<td>{{ "%.1e"|format(n.rival_relative_error) }}</td><td class="t">{{ n.rival }}</td></tr>
{% endfor %}</table>{% endif %}
{% if r.selection %}<h2>Top-k 1 %, exact: selections that took a second look</h2>
<table><tr><th>gradients</th><th>selections</th><th>second looks</th><th>ms per million elements</th></tr>
{% for s in r.selection %}<tr><td>{{ s.gradients }}</td><td>{{ s.selections }}</td>
<td>{{ s.second_looks }}</td><td>{{ "%.2f"|format(s.ms_per_million) }}</td></tr>
{% endfor %}</table>{% endif %}
{% if r.first_step %}<h2>First step</h2>
<table><tr><th>model</th><th>method</th><th>first, ms</th><th>later, ms</th><th>new state, MB</th></tr>
{% for f in r.first_step %}<tr><td>{{ f.model }}</td><td class="t">{{ f.method }}</td>
<td>{{ "%.2f"|format(f.first_ms) }}</td><td>{{ "%.3f"|format(f.later_ms) }}</td>
<td>{{ "%.1f"|format(f.state_bytes / 1e6) }}</td></tr>{% endfor %}</table>{% endif %}
{% if r.left_out %}<h2>Left out of this run</h2><ul>{% for line in r.left_out %}<li>{{ line }}</li>
{% endfor %}</ul>{% endif %}
</body></html>
"""


def write_html(results: dict[str, Any], plots: list[Path], out_dir: Path) -> Path:
    """Writes report.html with the pictures inside."""
    images = [(p.stem, base64.b64encode(p.read_bytes()).decode()) for p in plots]
    template = Environment(autoescape=True).from_string(TEMPLATE)
    path = out_dir / "report.html"
    text = template.render(
        r=results, env=results["environment"], images=images, claims=claims, ulp=ulp
    )
    path.write_text(text, encoding="utf-8")
    return path
