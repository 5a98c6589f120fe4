"""What the page looks like, and the few lines of script that sort its tables."""

STYLE = """
:root { --ink: #222; --pale: #666; --line: #ddd; --blue: #0062a0; --red: #b84a00 }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 12px; max-width: 1240px; color: var(--ink); background: #fff;
  font: 15px/1.45 Helvetica, Arial, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 24px; margin: 8px 0 } h2 { font-size: 20px; margin: 40px 0 0;
  border-top: 2px solid var(--ink); padding-top: 8px } h3 { font-size: 16px; margin: 26px 0 2px }
p { margin: 2px 0 8px; max-width: 80ch } .pale, .notes { color: var(--pale); font-size: 13px }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px } a { color: var(--blue) }
.wide { overflow-x: auto; max-width: 100% } .tall { max-height: 85vh; overflow-y: auto }
.tall thead th { position: sticky; top: 0; background: #fff }
.tall thead th:first-child { z-index: 1 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 4px 10px 4px 4px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; overflow-wrap: normal }
td small { display: block; color: var(--pale); font-size: 12px }
th:first-child { position: sticky; left: 0; background: #fff; max-width: 42vw; white-space: normal;
  overflow-wrap: anywhere; min-width: 8.5em; font-weight: normal }
thead th, thead th:first-child { border-bottom: 1px solid var(--ink); font-weight: 600 }
thead button { all: unset; cursor: pointer } thead button:focus-visible { outline: 2px solid }
th[aria-sort=ascending] button::after { content: " ▴" }
th[aria-sort=descending] button::after { content: " ▾" }
td small.better { color: var(--blue) } td small.worse { color: var(--red) }
td.free { white-space: normal; min-width: 16em; overflow-wrap: anywhere }
figure { margin: 0 0 8px } .legend { list-style: none; display: flex; flex-wrap: wrap; padding: 0;
  gap: 2px 16px; margin: 2px 0 8px; font-size: 13px }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 12px 20px } .panels > div { overflow-x: auto }
.panels svg { display: block; height: auto; max-width: min(100%, 460px) }
.panels.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)) }
.panels.one { display: block } .panels.one svg { max-width: none }
code, pre { font: 12px/1.4 ui-monospace, Menlo, Consolas, monospace }
pre { overflow-x: auto; background: #f6f6f6; padding: 8px; white-space: pre-wrap }
summary { cursor: pointer }
@media (max-width: 480px) { body { font-size: 14px } h2 { margin-top: 28px } }
@media print { body { max-width: none; font-size: 10pt; padding: 0 } nav { display: none }
  figure, tr { break-inside: avoid } h2, h3, h3 + p { break-after: avoid }
  .wide { overflow: visible; max-height: none }
  th, td { white-space: normal; padding-right: 5px } table { font-size: 8pt }
  td.free { min-width: 0 } th:first-child { position: static }
  .panels { grid-template-columns: repeat(2, 1fr) } pre { background: none } }
"""

# A click on a heading sorts by what a cell's data-v says, numbers as numbers; a second turns round.
SCRIPT = """
document.querySelectorAll('table.sorts').forEach(function (table) {
  table.querySelectorAll('thead th').forEach(function (th, column) {
    var button = document.createElement('button');
    button.type = 'button';
    button.title = 'sort';
    while (th.firstChild) button.appendChild(th.firstChild);
    th.appendChild(button);
    button.addEventListener('click', function () {
      var down = th.getAttribute('aria-sort') === 'ascending', body = table.tBodies[0];
      table.querySelectorAll('th').forEach(function (h) { h.removeAttribute('aria-sort'); });
      th.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      function value(row) { return row.cells[column].getAttribute('data-v') || ''; }
      Array.from(body.rows).sort(function (a, b) {
        var x = value(a), y = value(b);
        if (x === '' || y === '') return (x === '') - (y === '');
        var order = column ? x - y : x < y ? -1 : +(x > y);
        return down ? -order : order;
      }).forEach(function (row) { body.appendChild(row); });
    });
  });
});
"""
