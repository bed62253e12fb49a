"""docs/settings.md is what config.py says."""

from megatron_dgpo.config import Config
from megatron_dgpo.config_file import setting_names
from megatron_dgpo.settings_table import settings_of
from tools import settings_page


def test_page_is_current():
    assert settings_page.main(["--check"]) == 0, "run python tools/settings_page.py"


def test_every_setting_has_a_row():
    rows = [line.split("`")[1] for line in settings_page.page().splitlines() if line.startswith("| `")]
    assert rows == setting_names()


def test_every_setting_says_what_it_means():
    assert all(setting.meaning.endswith(".") for section in Config.model_fields for setting in settings_of(section))


def test_a_stale_page_is_refused(tmp_path, capsys):
    page = tmp_path / "settings.md"
    assert settings_page.main(["--check", "--page", str(page)]) == 1
    assert settings_page.main(["--page", str(page)]) == 0
    assert settings_page.main(["--check", "--page", str(page)]) == 0
    page.write_text(page.read_text().replace("`0.5`", "`0.6`"))
    capsys.readouterr()
    assert settings_page.main(["--check", "--page", str(page)]) == 1
    assert "run python tools/settings_page.py" in capsys.readouterr().err
