"""CSS of a report page."""

from earlyexit_kernels.page_style import COMMON

STYLE = (
    COMMON
    + """main { max-width: 62rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--grid); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, li { max-width: 46rem; overflow-wrap: break-word; }
.about, figcaption { color: var(--grey); font-size: .9rem; }
.lead { font-size: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tiles div { background: var(--soft); border-radius: .4rem; padding: .6rem .8rem; }
.tiles dt { font-size: .85rem; color: var(--grey); }
.tiles dd { margin: 0; font-size: 1.4rem; font-weight: 600; }
.tiles dd small { display: block; font-size: .85rem; font-weight: 400; color: var(--grey); }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem 1rem .5rem 2rem; }
figure { margin: 1rem 0; max-width: 36rem; }
figure.table { max-width: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.panels figure { margin: 0; }
svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; padding-top: .25rem; }
code { font-size: .9em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--grid); }
thead th { vertical-align: bottom; }
th.number { text-align: right; min-width: 4rem; }
td.number { text-align: right; white-space: nowrap; }
td.setting { min-width: 8rem; }
td.long { min-width: 10.5rem; overflow-wrap: anywhere; }
"""
)
