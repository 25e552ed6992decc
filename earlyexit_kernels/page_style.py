"""The frame of the HTML pages, the report and the status page of the server: nothing comes from elsewhere."""

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

#: Colours and type, before the rules of a page.
COMMON = """:root {
  --ink: #1a1d21; --paper: #fff; --soft: #f3f5f7; --grid: #d3d8de; --blue: #005f9e; --orange: #b34700;
  --grey: #5c6670; --warn: #fff3d6; --warn-line: #b37400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ec; --paper: #14171a; --soft: #1e2328; --grid: #3a424a; --blue: #62b5f0; --orange: #ff9a57;
    --grey: #a3adb8; --warn: #33290f; --warn-line: #d9a233;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
"""
